"""MANN, the memory-augmented neural network of Santoro et al. (2016), and the LSTM that it is compared with."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from .lrua_memory import LRUAMemory
from .mann_episode import MANNState, mann_episode

# Where the published code bases and the paper disagree.
PRESETS = {
    "tristandeleu": dict(least_used="per_head", write_vector="add", read_before_write=False, eps_mode="sqrt", eps=1e-6, forget_bias=0.0),
    "snowkylin": dict(least_used="shared", write_vector="add", read_before_write=True, eps_mode="add", eps=1e-8, forget_bias=1.0),
    "paper": dict(least_used="shared", write_vector="key", read_before_write=False, eps_mode="sqrt", eps=1e-6, forget_bias=0.0),
}
DEFAULT_PRESET = "snowkylin"
WRITE_VECTORS = ("add", "key")


class MANNCell(nn.Module):
    """One step of MANN: ``forward(x [B, I], state=None) -> ([h, r] [B, H + R M], state)`` (section 3.2).

    Args:
        input_size, hidden_size, memory_slots, memory_width, read_heads: I, H, N, M, R.
        usage_decay: gamma of the usage weights (equation 5).
        preset: ``"tristandeleu"``, ``"snowkylin"`` or ``"paper"``: the value of every option below that is None.
        least_used: ``"per_head"`` or ``"shared"``, as in :func:`fastmeta.functional.lrua_write`.
        write_vector: ``"add"``, a vector of its own, or ``"key"``.
        read_before_write: address the memory as it was before the write.
        eps_mode, eps: of the cosine, as in :func:`fastmeta.functional.cosine_attention`.
        forget_bias: added to the forget gate's part of ``controller.bias_ih`` when it is made; nothing later knows of it.
        strength: factor on the cosine: None for 1, a number, or ``"learned"``: ``1 + softplus(strength(h))``, one a head and step.

    Parameters: ``controller`` LSTMCell(I + R M, H), ``key`` and ``add`` Linear(H, R M), ``gate`` Linear(H, R), ``strength`` Linear(H, R);
    no ``add`` where the key is written, no ``strength`` where it is not learned.
    The state is a :class:`~fastmeta.reference.MANNState`; None is :meth:`initial_state`.
    """

    mann_episode = staticmethod(mann_episode)

    def __init__(self, input_size: int, hidden_size: int = 200, memory_slots: int = 128, memory_width: int = 40, read_heads: int = 4,
                 usage_decay: float = 0.95, preset: str = DEFAULT_PRESET, *, least_used: str | None = None, write_vector: str | None = None,
                 read_before_write: bool | None = None, eps_mode: str | None = None, eps: float | None = None,
                 forget_bias: float | None = None, strength: float | str | None = None):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"{type(self).__name__}: preset must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}")
        given = dict(least_used=least_used, write_vector=write_vector, read_before_write=read_before_write, eps_mode=eps_mode, eps=eps,
                     forget_bias=forget_bias)
        options = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        forget_bias, write_vector = options.pop("forget_bias"), options.pop("write_vector")
        if write_vector not in WRITE_VECTORS:
            raise ValueError(f"{type(self).__name__}: write_vector must be one of {', '.join(map(repr, WRITE_VECTORS))}, got {write_vector!r}")
        if isinstance(strength, str) and strength != "learned":
            raise ValueError(f"{type(self).__name__}: strength must be None, a number or 'learned', got {strength!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.memory = LRUAMemory(memory_slots, memory_width, read_heads, usage_decay=usage_decay, **options)
        self.controller = nn.LSTMCell(input_size + read_heads * memory_width, hidden_size)
        self.key = nn.Linear(hidden_size, read_heads * memory_width)
        self.add = nn.Linear(hidden_size, read_heads * memory_width) if write_vector == "add" else None
        self.gate = nn.Linear(hidden_size, read_heads)
        self.strength = nn.Linear(hidden_size, read_heads) if strength == "learned" else None
        self.fixed_strength = None if strength == "learned" else strength
        with torch.no_grad():
            self.controller.bias_ih[hidden_size:2 * hidden_size] += forget_bias

    def initial_state(self, batch_size: int) -> MANNState:
        """Zeros for the controller and the reads, and :meth:`LRUAMemory.initial_state`; dtype and device are those of the parameters."""
        like = dict(dtype=self.gate.weight.dtype, device=self.gate.weight.device)
        memory, usage, read_weights = self.memory.initial_state(batch_size, **like)
        hidden = torch.zeros(batch_size, self.hidden_size, **like)
        read = torch.zeros(batch_size, self.memory.read_heads, self.memory.memory_width, **like)
        return MANNState(hidden, hidden.clone(), read, read_weights, usage, memory)

    def run(self, inputs: Tensor, state: MANNState | None = None, lengths: Tensor | None = None) -> tuple[Tensor, MANNState]:
        """A whole sequence: ``[T, B, I] -> ([T, B, H + R M], state)``, with the ``lengths`` of :func:`fastmeta.functional.mann_episode`."""
        heads = [layer for layer in (self.key, self.add, self.gate, self.strength) if layer is not None]
        return self.mann_episode(
            inputs, self.initial_state(inputs.shape[1]) if state is None else state, self.controller.weight_ih, self.controller.weight_hh,
            self.controller.bias_ih + self.controller.bias_hh, torch.cat([layer.weight for layer in heads]),
            torch.cat([layer.bias for layer in heads]), lengths=lengths, own_add=self.add is not None,
            strength=self.fixed_strength if self.strength is None else "learned", **self.memory.options())

    def forward(self, x: Tensor, state: MANNState | None = None) -> tuple[Tensor, MANNState]:
        outputs, state = self.run(x.unsqueeze(0), state)
        return outputs.squeeze(0), state


def shift_labels(targets: Tensor, num_classes: int, previous: Tensor | None, lengths: Tensor | None,
                 like: Tensor) -> tuple[Tensor, Tensor]:
    """The labels as the network sees them, one step late, and the one that the step after the last will see: ``[T, B, L], [B, L]``.

    ``targets`` is integer ``[T, B]``, made one-hot, or label vectors ``[T, B, L]``; ``previous`` ``[B, L]`` is seen at step 0, None for zeros.
    """
    labels = (one_hot(targets.long(), num_classes) if targets.dim() == 2 else targets).to(like)
    previous = labels.new_zeros(labels.shape[1:]) if previous is None else previous.to(like)
    seen = torch.cat([previous.unsqueeze(0), labels])
    if lengths is None:
        return seen[:-1], seen[-1]
    return seen[:-1], seen.gather(0, lengths.long().view(1, -1, 1).expand(1, *seen.shape[1:])).squeeze(0)


class MANN(MANNCell):
    """The classifier of section 4: at each step it is shown ``x_t`` and the label of the step before, and says the class of ``x_t``.

    ``forward(inputs [T, B, I], targets, state=None, lengths=None) -> (logits [T, B, L], state)``. ``targets`` are the true classes, integer
    ``[T, B]``, or label vectors ``[T, B, L]``; that step t sees the label of t - 1 only is seen to here. ``lengths``, int ``[B]``: the steps of
    each episode; logits past the end are those of a zero output, and whatever stands there in ``inputs`` and ``targets`` changes nothing
    else (integer targets must be valid classes there too). The state returned continues the episodes where they ended.

    Args:
        input_size: numbers of an image, I.
        num_classes: L, classes or length of the label vectors.
        hidden_size, memory_slots, memory_width, read_heads, usage_decay, preset, and the options: as in :class:`MANNCell`.

    Parameters: those of :class:`MANNCell` with ``controller`` on ``[x, y, r]``, and ``output``, Linear(H + R M, L).
    """

    def __init__(self, input_size: int, num_classes: int, hidden_size: int = 200, memory_slots: int = 128, memory_width: int = 40,
                 read_heads: int = 4, usage_decay: float = 0.95, preset: str = DEFAULT_PRESET, **options):
        super().__init__(input_size + num_classes, hidden_size, memory_slots, memory_width, read_heads, usage_decay, preset, **options)
        self.num_classes = num_classes
        self.output = nn.Linear(hidden_size + read_heads * memory_width, num_classes)

    def forward(self, inputs: Tensor, targets: Tensor, state: tuple[Tensor, MANNState] | None = None,
                lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, MANNState]]:
        previous, memory = (None, None) if state is None else state
        seen, last = shift_labels(targets, self.num_classes, previous, lengths, inputs)
        outputs, memory = self.run(torch.cat([inputs, seen], -1), memory, lengths)
        return self.output(outputs), (last, memory)


class LSTMBaseline(nn.Module):
    """The LSTM alone, with the interface of :class:`MANN` (section 4.2): ``forward(inputs, targets, state=None, lengths=None)``.

    Parameters: ``lstm``, LSTM(I + L, H), and ``output``, Linear(H, L). The state is ``(last label, (h, c))``.
    """

    def __init__(self, input_size: int, num_classes: int, hidden_size: int = 200):
        super().__init__()
        self.num_classes = num_classes
        self.lstm = nn.LSTM(input_size + num_classes, hidden_size)
        self.output = nn.Linear(hidden_size, num_classes)

    def forward(self, inputs: Tensor, targets: Tensor, state=None, lengths: Tensor | None = None):
        previous, carried = (None, None) if state is None else state
        seen, last = shift_labels(targets, self.num_classes, previous, lengths, inputs)
        x = torch.cat([inputs, seen], -1)
        if lengths is None:
            outputs, carried = self.lstm(x, carried)
            return self.output(outputs), (last, carried)
        # A packed sequence must not be empty: an episode of length 0 runs one step, of which nothing is kept.
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu().clamp_min(1), enforce_sorted=False)
        outputs, after = self.lstm(packed, carried)
        outputs = nn.utils.rnn.pad_packed_sequence(outputs, total_length=len(x))[0]
        ended = lengths.view(1, -1, 1) == 0
        before = tuple(torch.zeros_like(new) for new in after) if carried is None else carried
        outputs = torch.where(ended, 0.0, outputs)
        return self.output(outputs), (last, tuple(torch.where(ended, old, new) for old, new in zip(before, after)))
