"""Exercise 4: data parallelism by hand.

Write the four functions, then find the bug in the fifth. What you need to know of the engine:

    model.zero_grad()                        forget all gradients
    model.parameters()                       the parameters p, in the same order on every rank
    p.data, p.grad                           values and gradient: NumPy arrays; p.grad is None before a backward
    p.assign_(values)                        overwrite a parameter's values
    model.loss(model(Tensor(x)), y)          a Tensor: the *sum* of the losses of all targets that are not -100
    loss.backward()                          adds this loss's gradient to every p.grad
    optimizer.step()                         change every p.data by its p.grad; skips those that are None
    comm.all_reduce(a)                       the sum of all ranks' arrays, a fresh array on each
    comm.broadcast(a, root=0)                the root's array, a fresh one on each rank
    comm.reduce(a, root=0)                   the sum, a fresh array on the root; None on all other ranks

`minipar.parallel`, with its `DataParallel` and `LocalSGD`, is not allowed here, nor is `minipar.distribute`: you are
writing them. Try things out with threads as ranks, in a file or notebook beside this one; compare with what one rank
gives, as the walkthrough does:

    import minipar
    from minipar.models import MLP, MLPConfig

    x, y = np.random.default_rng(0).normal(size=(7, 6)), np.array([0, 1, 2, 0, 1, 2, IGNORED])

    def one_rank():
        model = MLP(MLPConfig(inputs=6, classes=3, width=5, layers=2)).materialize(0, "float64")
        loss = sum_gradients(minipar.world(), model, x, y)
        return loss, {name: p.grad for name, p in model.named_parameters()}

    on_three = minipar.launch(one_rank, 3)      # a list: what each rank returned
    alone = minipar.launch(one_rank, 1)[0]      # the right answer for all of them

and have it judged, as often as you like and function by function, with `minipar grade 04 --file exercise.py`.
"""

import numpy as np

from minipar import Tensor

IGNORED = -100  # a target that does not count


def shard(samples, rank, ranks):
    """Return which samples of a global batch a rank works on.

    Shares are contiguous, in the order of ranks, and cover the batch. Where it does not divide, the first
    `samples % ranks` ranks have one sample more. With fewer samples than ranks the last shares are empty.

    Args:
        samples: size of the global batch, 0 or more. rank: 0 to ranks - 1.

    Returns:
        a slice (start, stop), both from 0 to `samples`: shard(7, 1, 3) is slice(3, 5).
    """
    raise NotImplementedError("shard: a slice of the batch for this rank")


def sum_gradients(comm, model, x, y):
    """Compute this rank's share of the batch and leave the full batch's gradient on every rank.

    Args:
        comm: a communicator of N ranks.
        model: the same on every rank. Its gradients may still be those of the step before: they do not count.
        x: (B, features), the *global* batch, the same on every rank. y: (B,) integers; `IGNORED` counts nothing.

    Returns:
        float: the loss of the global batch, the mean over its valid targets; the same on every rank.

    Contract:
        - Afterwards every p.grad is the gradient of that mean, as a serial run on the whole batch has it.
        - Each rank computes its `shard` and no more. Shares may be unequal, may be empty, and may have any
          number of ignored targets.
        - All ranks call the same collectives in the same order, whatever their share is. A rank whose share is
          empty takes part too; a parameter without a gradient counts as zeros. The batch has a valid target.
        - x, y and the model's values are not changed.
    """
    raise NotImplementedError("sum_gradients: my share's loss by the global count, backward, sum over ranks")


def step_at_master(comm, model, optimizer, master=0):
    """Take one step at a master: gradients are summed there, it alone steps, and all get its new parameters.

    Args:
        model: the same values on every rank; p.grad is this rank's part of the gradient (already divided by the
            global count), or None, which counts as zeros.
        optimizer: one on every rank, over model.parameters(). Only the master's is ever stepped.
        master: from 0 to N-1.

    Contract:
        - Afterwards every rank has the parameters that a serial step with the sum of all p.grad gives, the same
          bits on every rank.
        - Afterwards every p.grad is None, on every rank.
        - It takes one `reduce` and one `broadcast` a parameter, and no other communication.
    """
    raise NotImplementedError("step_at_master: reduce to the master, step there, broadcast the parameters")


def average_parameters(comm, model, seen):
    """Replace every parameter by the average over the ranks, weighted by what each rank has seen.

    Args:
        model: may have other values on every rank.
        seen: number of valid targets that this rank trained on since the last average, 0 or more; another one
            on every rank. If nobody has seen any, all ranks weigh the same.

    Contract:
        - Afterwards all ranks have the same bits, and p.data has the dtype that it had.
        - Only `all_reduce` is used: one a parameter, and one for the counts.
    """
    raise NotImplementedError("average_parameters: sum of each rank's share of all seen times its parameters")


def accumulate_gradients(comm, model, pieces, count):
    """BUG HUNT. Return nothing; leave the global batch's gradient in every p.grad, from several microbatches.

    With one microbatch a rank it is equal to the serial run. Somebody with little memory uses two, and after
    that four. The loss falls, the runs differ a bit, which is put down to rounding. Compare gradients: 2 ranks
    with 2 microbatches each, 2 ranks with 4, 4 ranks with 2.

    Mend it. Args:
        model: the same on every rank. Gradients of the step before may be left in it.
        pieces: list of (x, y): this rank's microbatches. Ranks may have different numbers of them, and none.
        count: valid targets of the global batch: all pieces of all ranks.

    Contract:
        - Afterwards every p.grad is the gradient of the mean over the global batch, on every rank.
        - One `all_reduce` a parameter, whatever the number of microbatches; a parameter without a gradient
          counts as zeros.
    """
    model.zero_grad()
    for x, y in pieces:
        loss = model.loss(model(Tensor(x)), y) / count
        loss.backward()
        for p in model.parameters():
            mine = np.zeros_like(p.data) if p.grad is None else p.grad
            p.grad = comm.all_reduce(mine)
