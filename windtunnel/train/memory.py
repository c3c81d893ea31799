"""How much memory a training step takes: counted from the shape, tensor by tensor, before anything is trained. Needs no torch.

Counted is what one process holds at the worst moment of a step in fp32: the beginning of the backward pass (activations kept by
all layers, the head at work) or its end (all gradients there). Compiled code keeps about a tenth less. What the allocator loses
and what the process takes before any tensor were measured (``docs/lab-log.md``), on a CPU. Shapes: N positions of a
micro-batch, D width, V entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from windtunnel.model.chunked_size import chunk_positions, is_chunked
from windtunnel.model.shape import Shape
from windtunnel.train.noise import EVERY, EVERY_HALVED
from windtunnel.train.stage import Muon, Stage

MICRO_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Tokens of a micro-batch at most, one row at least; on a CPU 1,024 to 4,096 are equally fast (docs/lab-log.md)."""
EXPERTS_MORE = 8
"""How many times larger a micro-batch of experts may be: they multiply faster in long slices, and a step that is one
micro-batch needs no pass to count their load first."""
KEPT = {"cpu": 1 << 30, "cuda": 16 << 30}
"""Bytes of activations of a micro-batch above which layers are computed again instead."""
PROCESS = 300 << 20
"""Resident memory of a process that has loaded torch and the package, before any tensor."""
_LOST, _LOSES = 60 << 20, 1.15
"""What the allocator and the libraries' own buffers add: a constant, and a factor on the tensors."""
_FLOAT = 4


@dataclass(frozen=True)
class StepMemory:
    """Bytes in one process, by what they are for, and how many such processes there are.

    ``activations`` is what layers keep for the backward pass, ``work`` what the head or one layer that is computed again needs
    beside it. Gradients are there only when the activations have gone, unless ``earlier`` passes have left theirs.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    work: int
    earlier: bool
    recompute: bool
    chunked: bool
    lanes: int = 1
    reference: int = 0
    """A frozen model beside the one that trains."""

    @property
    def tensors(self) -> int:
        """The largest sum at any moment."""
        passing = self.activations + self.work
        step = self.gradients + passing if self.earlier else max(self.gradients, passing)
        return self.weights + self.reference + self.moments + step

    @property
    def resident(self) -> int:
        """Expected peak of the resident memory of all processes."""
        return self.lanes * (PROCESS + _LOST + round(_LOSES * self.tensors))


def micro_rows(stage: Stage, device: str = "cpu", world: int = 1) -> int:
    """Rows of a micro-batch. The first batch decides, so that a trunk and its branches cut every step alike and agree bit for
    bit."""
    most = MICRO_TOKENS[device] * (EXPERTS_MORE if stage.shape.experts > 1 else 1)
    return min(max(1, most // stage.plan.row), -(-stage.batch // world))


def recomputes(stage: Stage, device: str = "cpu", world: int = 1) -> bool:
    """Whether a stage computes its layers again in the backward pass: as it says, or by what they would keep."""
    if stage.recompute != "auto":
        return stage.recompute == "always"
    positions = micro_rows(stage, device, world) * stage.plan.row
    return stage.shape.layers * positions * kept_by_layer(stage.shape) > KEPT[device]


def kept_by_layer(shape: Shape) -> int:
    """Bytes that a layer keeps of each position.

    Its input, twice (after attention too), what either norm makes of it before and after the gain; queries, keys, values and
    attention's output with its normaliser; gate, up, their product and the gate after the silu, for each expert that the
    position passes through, where rows are also copied, sorted and sorted back.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    numbers = 6 * shape.width + 2 * queries + 2 * keys + shape.heads
    if shape.qk_norm:
        numbers += 2 * (queries + keys)
    numbers += (
        4 * shape.ff if shape.experts == 1 else shape.top_k * (4 * shape.ff + 3 * shape.width) + 2 * shape.experts
    )
    return _FLOAT * numbers


def step_memory(stage: Stage, device: str = "cpu", lanes: int = 1) -> StepMemory:
    """What a step of the stage takes where ``lanes`` processes with a copy each share its batch."""
    shape, micro = stage.shape, micro_rows(stage, device, lanes)
    positions = micro * stage.plan.row
    again, chunked = recomputes(stage, device, lanes), is_chunked(positions, shape.padded_vocab)
    weights = _FLOAT * (shape.total + (shape.padded_vocab - shape.vocab) * shape.width * (1 if shape.tied else 2))
    trained = _FLOAT * stage.lora.parameters(shape) if stage.lora else weights
    layer = positions * kept_by_layer(shape)
    stream = _FLOAT * positions * shape.width
    if chunked:
        chunk = _FLOAT * min(positions, chunk_positions(shape.vocab, device)) * shape.vocab
        head = 4 * stream + 3 * chunk + 2 * _FLOAT * shape.padded_vocab * shape.width
    else:
        head = 3 * stream + 4 * _FLOAT * positions * shape.padded_vocab
    gradients = trained * (1 + _copies(stage, micro, lanes))
    activations = shape.layers * (stream if again else layer)
    work = max(head, layer + 2 * _FLOAT * positions * shape.ff) if again else head
    moments = trained + _second(stage, trained)
    earlier = -(-stage.batch // lanes) > micro or (lanes == 1 and is_halved(stage))
    reference = weights if stage.preference is not None and stage.preference.is_beside and stage.lora is None else 0
    return StepMemory(weights, gradients, moments, activations, work, earlier, again, chunked, lanes, reference)


def is_halved(stage: Stage) -> bool:
    """Whether half of a step's only micro-batch passes once more, now and then, to measure the gradient's noise."""
    return stage.kind == "trunk" and stage.balance is None and stage.batch > 1 and stage.own_steps >= EVERY_HALVED


def _copies(stage: Stage, micro: int, lanes: int) -> int:
    """Copies of the gradients besides themselves: one to measure their noise, one to average them over processes."""
    parts = -(-stage.batch // lanes) > micro
    return int(stage.objective == "lm" and parts and stage.own_steps >= EVERY) + int(lanes > 1)


def _second(stage: Stage, trained: int) -> int:
    """Bytes of second moments: Muon's matrices have none, and experts stay with AdamW."""
    if not isinstance(stage.optimizer, Muon) or stage.shape.experts > 1:
        return trained
    return trained - _FLOAT * stage.shape.matrices
