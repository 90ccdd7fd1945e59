"""Exercise 10: training in float16 without losing the small numbers.

Write four functions and a class, then find the bug in the sixth. Plain NumPy and a communicator (lesson 04);
nothing of `minipar.amp` is needed, which is what you write here in small.

float16 has ten bits of fraction, nothing above 65504 but infinity, and nothing but zero below 2^-24 ≈ 6e-8
(what is nearer to 2^-24 than to zero becomes 2^-24). Judge it with `minipar grade 10 --file exercise.py`.
"""

import numpy as np


def lost_share(g, scale=1.0):
    """Return how much of a gradient float16 loses, once it is multiplied by a loss scale.

    Args:
        g: float32, any shape; finite. Some elements may be zero.
        scale: a power of two.

    Returns:
        (vanish, overflow): of the elements that are not zero, the share that becomes zero when scale * g is
        rounded to float16, and the share that becomes infinite. Two floats from 0 to 1; (0.0, 0.0) if all
        elements are zero.

    Contract: `g` is not changed.
    """
    raise NotImplementedError("lost_share: scale in float32, round to float16, compare with what was there")


class LossScale:
    """The loss scale, found by trial.

    Attributes:
        scale: the present scale, a float; `init` at first.

    After every step `update` is told whether a gradient overflowed:
        - overflow: the scale is multiplied by `backoff`, but never falls below `floor`.
        - `interval` steps without overflow since the scale last changed, or since the last overflow: the scale
          is multiplied by `growth`.
    """

    def __init__(self, init=2.0**16, growth=2.0, backoff=0.5, interval=2000, floor=1.0):
        raise NotImplementedError("LossScale: keep the scale, and count the good steps in a row")

    def update(self, overflowed: bool) -> None:
        raise NotImplementedError("LossScale.update: what happens to the scale, and what to the count?")


def sum_gradients(comm, g):
    """Return the sum over all ranks of their float16 gradients, in float32. Collective.

    The sum of numbers that fit float16 need not fit it: 2 × 40000 is infinite there, and 2048 + 1 is 2048.

    Args:
        g: float16, the same shape on every rank.

    Returns:
        float32, the same on every rank. No partial sum is ever rounded to float16.

    Contract: `g` is not changed.
    """
    raise NotImplementedError("sum_gradients: one all-reduce, in which dtype?")


def any_overflow(comm, gradients):
    """Return whether any rank holds a gradient with an infinity or NaN; the same answer on every rank. Collective.

    The ranks hold different parts of the model, so their lists differ: in length, in shapes, and a list may be
    empty. Either all ranks skip the step or none does, hence the common answer.

    Args:
        gradients: a list of float32 arrays of this rank. Large finite values (3e38) are no overflow.

    Returns:
        a bool.

    Contract: every rank calls one all-reduce of one number, whatever it found.
    """
    raise NotImplementedError("any_overflow: look at your own, then agree")


def mixed_step(comm, master, moment, gradient_of, loss_scale, lr, momentum, max_norm):
    """Take one step of SGD with momentum in mixed precision, on data-parallel ranks. Collective.

    In this order: round the master weights to float16; compute this rank's gradient with them; sum over the
    ranks; undo the loss scale; if anything overflowed, skip the step; otherwise clip, and step.

        moment ← momentum · moment + g          master ← master - lr · moment

    Args:
        master: float32 (n,), the same on every rank.
        moment: float32 (n,), the same on every rank.
        gradient_of: gradient_of(weights, scale) takes float16 weights and the loss scale, and returns float16
            (n,): scale times this rank's part of the gradient. The parts *add up* to the whole gradient.
        loss_scale: a `LossScale`.
        lr, momentum: floats.
        max_norm: the whole gradient, unscaled, is multiplied by max_norm / norm if its 2-norm is larger.

    Returns:
        (master, moment): new float32 arrays, the same on every rank; the arguments are not changed. If the
        step was skipped they are equal to the arguments.

    Contract: `loss_scale.update` is called once, after all else.
    """
    raise NotImplementedError("mixed_step: float16 weights and gradients, float32 for all that adds up")


def accumulated_gradient(weights, pieces, gradient_of, scale):
    """Return the gradient of a batch that is computed piece by piece. THERE IS ONE BUG: mend it.

    With one or two pieces the result agrees with that of the undivided batch. With 64 it is a few per cent off,
    with 4096 it is useless, and no error is raised.

    Args:
        weights: float16 (n,).
        pieces: a list of microbatches, each passed to gradient_of.
        gradient_of: gradient_of(weights, piece, scale) returns float16 (n,), scale times the piece's part of
            the gradient; the parts add up.
        scale: the loss scale.

    Returns:
        (gradient, overflowed): float32 (n,), unscaled, and a bool.
    """
    total = np.zeros_like(weights)
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in pieces:
            total += gradient_of(weights, piece, scale)
        gradient = total.astype(np.float32) / np.float32(scale)
    return gradient, bool(not np.isfinite(gradient).all())
