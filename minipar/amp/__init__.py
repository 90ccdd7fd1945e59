"""Mixed precision: float16 where it is fast, float32 where it must be, and a loss scale in between.

    scaler = GradScaler()
    for inputs, targets in batches:
        optimizer.zero_grad()
        with autocast("float16"):
            loss = model.loss(model(inputs), targets) / targets.size
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)           # so that clipping sees the true gradients
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)               # or no step, if a gradient overflowed
        scaler.update()

`autocast` chooses the precision operation by operation, `GradScaler` keeps small gradients from vanishing,
`PrecisionPolicy` takes single layers out of float16 by what is seen of their values and gradients, and
`MixedPrecision` puts the three together for the training job.
"""

from minipar.amp.autocast import autocast
from minipar.amp.histogram import ExponentHistogram
from minipar.amp.mixed import MixedPrecision
from minipar.amp.policy import Decision, PolicyConfig, PrecisionPolicy
from minipar.amp.scaler import GradScaler
