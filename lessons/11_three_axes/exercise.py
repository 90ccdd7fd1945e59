"""Exercise 11: a mesh of ranks, a norm over it, and weights that move from one layout to another.

Write five functions, then find the bug in the sixth. NumPy and a communicator are all you need: its `split`
(this lesson's walkthrough) and `all_reduce` (lesson 03). `minipar.mesh` and `minipar.checkpoint` are not to be
used, they are what you write here in small. Judge it with `minipar grade 11 --file exercise.py`.

A *box* says where an array lies in a larger one: ((start, stop), …), one pair an axis, stop not included. The
box ((0, 2), (4, 6)) of an (8, 8) weight is its rows 0 and 1, columns 4 and 5.
"""

import numpy as np


def place(rank, dp, pp, tp):
    """Return where a rank stands on the mesh: its index along the data, pipeline and tensor axes.

    Tensor-parallel neighbours talk the most, so they are adjacent ranks; then come the stages of a pipeline;
    data-parallel neighbours are the farthest apart. On dp 2 × pp 1 × tp 2:

                 tp 0    tp 1
        dp 0     rank 0  rank 1
        dp 1     rank 2  rank 3

    Returns:
        (d, p, t), 0 ≤ d < dp, 0 ≤ p < pp, 0 ≤ t < tp.
    """
    raise NotImplementedError("place: which index changes from one rank to the next?")


def axes(comm, dp, pp, tp):
    """Return this rank's communicators along the three axes. Collective: all ranks call it together.

    The tensor group of a rank are the ranks that differ from it in t only; likewise for the others. In each
    group ranks are numbered by their index along that axis: rank t of the tensor group stands at t.

    Args:
        comm: dp · pp · tp ranks.

    Returns:
        (dp group, pp group, tp group), three communicators.

    Contract: three calls of `comm.split(color, key)`, on every rank in the same order. Ranks that pass the same
    colour, a whole number of zero or more, come into one group, and are ordered in it by the keys they pass.
    """
    raise NotImplementedError("axes: what do the members of a tensor group have in common?")


def gradient_norm(comm, held):
    """Return the 2-norm of the whole gradient, each element counted once; the same on every rank. Collective.

    A rank holds parts of the gradient. What it holds may be held by others, too: a replica's gradient by all its
    replicas, a norm's by all tensor-parallel ranks.

    Args:
        comm: all ranks of the mesh.
        held: list of (g, copies): a float32 array of any shape, and the number of ranks, this one included, that
            hold these same elements. Lists differ from rank to rank, and may be empty.

    Returns:
        a float, √Σ g² over the distinct elements.

    Contract: one all-reduce of one float64 number. Squares are added up in float64: g may be as large as 1e30.
    """
    raise NotImplementedError("gradient_norm: what does each of `copies` ranks add to the sum of squares?")


def shard_boxes(shape, dim, groups, ranks, rank):
    """Return the boxes of a weight that a tensor-parallel rank holds.

    The weight is cut along axis `dim`. With groups = 1 each rank holds one of `ranks` equal ranges, in the order
    of ranks. A fused weight is `groups` equal blocks laid one after the other along `dim` (query, key and value:
    3), and each block is cut by itself: a rank holds a range of each.

    Args:
        shape: of the whole weight; groups · ranks divides shape[dim].

    Returns:
        a list of `groups` boxes, in the order of blocks; each a tuple of (start, stop), one an axis.
    """
    raise NotImplementedError("shard_boxes: first the range within a block, then where each block begins")


def assemble(blocks, box):
    """Return the elements in a box, from blocks that lie anywhere.

    This is how a checkpoint moves from one layout to another: whoever wrote the blocks, a reader takes of each
    one what it has in common with its own box.

    Args:
        blocks: list of (box, array), array.shape being the box's extent; they do not overlap. All have one dtype.
            Boxes and arrays of no axis, () and a number, are legal: they hold one element.
        box: what is wanted.

    Returns:
        an array of the box's extent and the blocks' dtype, fresh.

    Raises:
        ValueError: some element of the box is in no block.
    """
    raise NotImplementedError("assemble: intersect, then index both: relative to the block, relative to the box")


def recut(parts, dim, groups, ranks):
    """Return a weight's parts for another number of tensor-parallel ranks. THERE IS ONE BUG: mend it.

    It is right for weights that are not fused, and shapes are always right. But a model whose attention weights
    went through it has a loss as if it had never been trained.

    Args:
        parts: the parts of the ranks so far, in order: what `shard_boxes` says each holds, its groups joined along
            `dim`.
        dim, groups: as in `shard_boxes`.
        ranks: how many there shall be; groups · ranks divides the whole weight's size along `dim`.

    Returns:
        list of `ranks` arrays, in the same form.
    """
    whole = np.concatenate(parts, axis=dim)
    blocks = np.split(whole, groups, axis=dim)
    cuts = [np.split(block, ranks, axis=dim) for block in blocks]
    return [np.concatenate([cut[rank] for cut in cuts], axis=dim) for rank in range(ranks)]
