"""An activation is let go after I, though W still needs the stage's input."""

MESSAGE = "an activation was let go after I"


def peak_live(schedule):
    peaks = []
    for actions in schedule:
        live = peak = 0
        for kind, _ in actions:
            live += (kind == "F") - (kind in ("B", "I"))
            peak = max(peak, live)
        peaks.append(peak)
    return peaks
