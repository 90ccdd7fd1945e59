"""One number for the whole pipeline is returned."""

MESSAGE = "stages have memories of their own"


def peak_live(schedule):
    peak = 0
    for actions in schedule:
        live = 0
        for kind, _ in actions:
            live += (kind == "F") - (kind in ("B", "W"))
            peak = max(peak, live)
    return peak
