"""The count is not set back when the scale grows, which then grows at every step."""

MESSAGE = "the scale grows at every step"


class LossScale:
    def __init__(self, init=2.0**16, growth=2.0, backoff=0.5, interval=2000, floor=1.0):
        self.scale, self.good = float(init), 0
        self.growth, self.backoff, self.interval, self.floor = growth, backoff, interval, floor

    def update(self, overflowed):
        if overflowed:
            self.scale, self.good = max(self.scale * self.backoff, self.floor), 0
            return
        self.good += 1
        if self.good >= self.interval:
            self.scale *= self.growth
