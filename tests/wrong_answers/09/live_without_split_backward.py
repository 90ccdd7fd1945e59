"""Only B lets an activation go, so that with I and W nothing ever does."""

MESSAGE = "nothing was ever let go"


def peak_live(schedule):
    peaks = []
    for actions in schedule:
        live = peak = 0
        for kind, _ in actions:
            live += (kind == "F") - (kind == "B")
            peak = max(peak, live)
        peaks.append(peak)
    return peaks
