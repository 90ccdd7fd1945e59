"""ZeRO: data parallelism in which no two ranks keep the same thing (Rajbhandari et al. 2020).

In data parallelism every rank keeps all parameters, all gradients and all optimizer state. Here the flat
array of each unit's elements is cut into equal ranges, and rank r keeps of range r alone

        stage 1     optimizer state
        stage 2     optimizer state, gradients
        stage 3     optimizer state, gradients, parameters

With Ψ parameters and k microbatches a step moves, times (N-1)/N and padding included, 2Ψ elements in
stage 1 (reduce-scatter of gradients, all-gather of parameters), (k+1)Ψ in stage 2 (gradients of each
microbatch) and 3kΨ in stage 3 (parameters in forward and in backward, gradients). Beside these goes one byte
per parameter tensor and synchronising backward: whether any rank used it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

from minipar import optim
from minipar.backend import Array, array_module, float_dtype, is_gpu_array, to_device
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.nn import Module, Parameter
from minipar.parallel.batch_norm import refuse_microbatches, share_statistics
from minipar.parallel.norms import global_norm
from minipar.parallel.placement import is_sharded
from minipar.parallel.zero.flat_shards import FlatUnit, Piece, make_units
from minipar.parallel.zero.gather import GatherOnUse
from minipar.parallel.zero.scatter_gradients import ScatterGradients, on_any_rank
from minipar.tensor import Tensor

ROOT = 0


class Zero:
    """A model trained on shares of the batch, its state cut into equal ranges over the ranks of `comm`.

    Build optimizers on `shards()`, not on the model's parameters. Each piece of the batch contributes its sum
    over the global count, as in data parallelism; gradients are summed.

    Args:
        model: materialised (then rank 0's values are everyone's), or not (then call `materialize` here, which
            in stage 3 gives every rank its own range and nothing else). A tensor-parallel plan comes first:
            what this rank holds of a parameter is what is cut.
        comm: the ranks that share the batch.
        stage: 1, 2 or 3.
        units: the modules whose parameters are gathered, freed and reduced together, in the order in which
            forward runs them; by default the model's `blocks`, or the whole model if it has none. Parameters
            of no unit, or of several (tied weights), make up one unit more, which is reduced last and, in
            stage 3, whole during an entire forward or backward.
        prefetch: stage 3: gather the next unit while one computes.

    Raises:
        UsageError: an unknown stage, a model without parameters or materialised in part, a unit that is not
            of the model, or one that mixes dtypes.
    """

    def __init__(
        self,
        model: Module,
        comm: Communicator,
        stage: int,
        *,
        units: Sequence[Module] | None = None,
        prefetch: bool = True,
    ):
        if stage not in (1, 2, 3):
            raise UsageError(f"Zero: stage {stage!r} does not exist: use 1, 2 or 3")
        model.assign_paths()
        named = list(model.named_parameters())
        if not named:
            raise UsageError(f"Zero: {type(model).__name__} has no parameters to cut")
        materialized = {p.is_materialized for _, p in named}
        if len(materialized) > 1:
            raise UsageError("Zero: the model is materialised in part; materialise all of it, or nothing")
        self.model, self.comm, self.stage = model, comm, stage
        self.names = {id(p): name for name, p in named}
        blocks = list(units if units is not None else getattr(model, "blocks", [model]))
        described = [(f"unit {i} ({type(b).__name__})", list(b.parameters())) for i, b in enumerate(blocks)]
        own, shared = make_units(named, described, comm.rank, comm.size, stage == 3)
        self.units: list[FlatUnit] = [u for u in (*own, shared) if u is not None]
        self._ready = False
        self.scatters = ScatterGradients(comm, own, shared, self.names, stage)
        share_statistics(model, comm)
        self.gathers: GatherOnUse | None = None
        if stage == 3:
            gather = comm.split(0, name="gather")
            assert gather is not None
            self.gathers = GatherOnUse(gather, blocks, own, shared, prefetch)
        if True in materialized:
            for unit in self.units:
                unit.begin(comm.broadcast_(unit.adopt(), root=ROOT))
            for _, buffer in model.named_buffers():
                buffer.assign_(comm.broadcast(buffer.data, root=ROOT))
            self._is_ready()

    def materialize(self, seed: int, dtype: Any = "float32", device: str = "cpu") -> Self:
        """Give every rank its values, bitwise those of the serial initialisation; nothing is communicated.

        Raises:
            UsageError: the model has values already.
        """
        if self._ready:
            raise UsageError("Zero: the model has its values already")
        for unit in self.units:
            unit.begin(unit.draw(seed, float_dtype(dtype), device))
        for _, b in self.model.named_buffers():
            b.data = to_device(b.data.astype(float_dtype(dtype)), device)
        self._is_ready()
        return self

    def _is_ready(self) -> None:
        self._ready = True
        self._versions = [piece.tensor.version for piece in self._pieces()]
        for p in self._parameters():
            p.version += 1

    def _parameters(self) -> Iterator[Parameter]:
        for unit in self.units:
            yield from unit.params

    def _pieces(self) -> Iterator[Piece]:
        for unit in self.units:
            yield from unit.pieces

    # Forward and backward -----------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Any:
        self._check_current()
        return self.model(*inputs) if self.gathers is None else self.gathers.forward(self.model, inputs)

    def _check_current(self) -> None:
        if not self._ready:
            raise UsageError("Zero: the model has no values yet: call materialize(seed=...) on the wrapper")
        if self._versions != [piece.tensor.version for piece in self._pieces()]:
            raise UsageError(
                "Zero: the shards have changed and the parameters have not: take steps with step(optimizer)"
            )

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For all but the last of several microbatches. Stage 1 then adds to this rank's whole gradients.

        Stages 2 and 3 keep no whole gradient, so they sum every microbatch over the ranks, inside or outside.

        Raises:
            UsageError: the model has batch norm, whose statistics would be those of one microbatch.
        """
        refuse_microbatches(self.model)
        before, self.scatters.active = self.scatters.active, self.stage > 1
        try:
            yield
        finally:
            self.scatters.active = before

    def synchronize(self) -> None:
        """Sum the gradients over the ranks, each range on its owner, and free the whole ones.

        Backward calls it. Call it yourself only where no gradient was computed at all on this rank, so that
        the others do not wait, or in stage 1 after backwards inside `no_sync`.

        Raises:
            UsageError: stage 3, where a rank without samples must gather with the others, too.
        """
        if self.gathers:
            raise UsageError(
                "Zero: in stage 3 every rank takes part in forward and backward; run them on an empty share"
            )
        self.scatters.finish()

    # Optimizer ----------------------------------------------------------------------------------------

    def shards(self) -> list[tuple[Parameter, Tensor]]:
        """Return (parameter, what this rank owns of it) for each parameter that it owns a piece of.

        A piece is (n,), consecutive elements of the parameter; `.grad` is set by backward. A rank that owns
        nothing gets one empty piece, so that it can build the same optimizer as the others.
        """
        if not self._ready:
            raise UsageError("Zero: the model has no values yet: call materialize(seed=...) on the wrapper")
        pieces = [(piece.param, piece.tensor) for piece in self._pieces()]
        return pieces or [(self.units[0].params[0], Tensor(self.units[0].own[:0], requires_grad=True))]

    def step(self, optimizer: optim.Optimizer) -> None:
        """Take the optimizer's step on this rank's pieces; in stages 1 and 2 everyone then gets all values.

        Raises:
            UsageError: the optimizer was not built on `shards()`.
        """
        known = {id(piece.tensor) for piece in self._pieces()}
        strange = [t for t in optimizer.tensors() if id(t) not in known]
        if any(isinstance(t, Parameter) or t.size for t in strange):
            raise UsageError("Zero: build the optimizer on the tensors of shards(), not on the parameters")
        optimizer.step()
        self._spread()

    def _spread(self) -> None:
        """Make the whole parameters those that the shards now say."""
        if self.stage < 3:
            following = self.comm.all_gather_async(self.units[0].own)
            for i, unit in enumerate(self.units):
                work = following
                if i + 1 < len(self.units):
                    following = self.comm.all_gather_async(self.units[i + 1].own)
                unit.attach(work.wait())
        self._is_ready()

    def grad_norm(self) -> float:
        """Return the 2-norm of the whole gradient, each element counted once; the same on every rank.

        Of a model that a tensor-parallel plan has cut, the sum goes over its ranks as well. Give the norm to
        `optim.clip_grad_norm_(pieces, max_norm, norm)` to clip.
        """
        axes = {id(p.layout.axis): p.layout.axis for p in self._parameters() if is_sharded(p)}
        if len(axes) > 1:
            raise UsageError("Zero: parameters are cut over several axes; take the norm with norms.global_norm")
        pairs = [(piece.param, piece.tensor) for piece in self._pieces()]
        return global_norm(pairs, shard_comm=self.comm, tp=next(iter(axes.values()), None))

    def zero_grad(self) -> None:
        """Forget all gradients, whole and owned."""
        self.model.zero_grad()
        for piece in self._pieces():
            piece.tensor.grad = None

    # The whole model ----------------------------------------------------------------------------------

    def full(self, kind: Literal["data", "grad"] = "data") -> dict[str, Array]:
        """Return {name: array} of all whole parameters, or of the summed gradients of those that have one.

        Collective. Every rank gets everything: for verification, and for models that fit.
        """
        return dict(self.full_by_unit(kind))

    def full_by_unit(self, kind: Literal["data", "grad"] = "data") -> Iterator[tuple[str, Array]]:
        """Yield what `full` returns, unit by unit, so that no more than one is whole at a time."""
        if kind not in ("data", "grad"):
            raise UsageError(f"Zero: full({kind!r}) is unknown: use data or grad")
        for unit in self.units:
            flat, present = unit.own, set(range(len(unit.params)))
            if kind == "grad":
                flat, present = unit.own_gradient()
            shown = on_any_rank(self.comm, present, len(unit.params))
            for i, (p, view) in enumerate(zip(unit.params, unit.views(self.comm.all_gather(flat)))):
                if i in shown:
                    yield self.names[id(p)], view

    def load(self, state: Mapping[str, Array]) -> None:
        """Take values by name (in this rank's local shapes); each rank reads its own range of them.

        Raises:
            UsageError: a name that is missing, or a shape that differs. Nothing is changed then.
        """
        for unit in self.units:
            for p, shape in zip(unit.params, unit.shapes):
                name = self.names[id(p)]
                found = state[name].shape if name in state else None
                if found != shape:
                    raise UsageError(f"Zero: {name} is {shape}, the given state has {found or 'nothing'}")
        for piece in self._pieces():
            values = state[self.names[id(piece.param)]].reshape(-1)
            mine = values[piece.start : piece.start + piece.tensor.size]
            piece.tensor.assign_(to_device(mine, "cuda" if is_gpu_array(piece.tensor.data) else "cpu"))
        self._spread()

    def reload(self) -> None:
        """Make everyone's parameters follow values that were written into the pieces from outside. Collective."""
        self._spread()

    def detach(self) -> Module:
        """Return the model as a plain one, whole on every rank and without hooks. Collective in stage 3."""
        self.scatters.remove_hooks()
        if self.gathers:
            self.gathers.unwrap()
        for unit in self.units:
            whole = unit.whole if unit.whole is not None else self.comm.all_gather(unit.own)
            for p, view in zip(unit.params, unit.views(whole)):
                p.data = array_module(view).array(view)
                p.sharded = None
            unit.whole = None
        return self.model

    def table(self) -> str:
        """Return one line a unit: parameters, elements, padding, elements and bytes that this rank owns."""
        rows: list[tuple[str, ...]] = [("unit", "tensors", "elements", "padding", "owned", "bytes")]
        for unit in self.units:
            size = str(unit.own.nbytes) if self._ready else "-"
            counts = (len(unit.params), unit.numel, unit.padding, unit.count)
            rows.append((unit.name, *map(str, counts), size))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"ZeRO stage {self.stage} over {self.comm.size} ranks"]
        for name, *numbers in rows:
            lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]))
        return "\n".join(lines)

    __str__ = table
