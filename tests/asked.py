"""What an attention of another library says of itself, found by asking it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from speakers import Speaker, of
from torch import Tensor

import attnzoo

WIDTH, LENGTH, WINDOW = 16, 9, 3
#: Which axes of (batch, heads, length, width) stand where.
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "batch heads length width": lambda x: x,
    "batch length heads width": lambda x: x.transpose(1, 2),
}
ONE_HEAD: Mapping[str, Callable[[Tensor], Tensor]] = {"batch length width": lambda x: x[:, 0]}
DECAYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "natural logarithm": lambda g: g,
    "logarithm to 2": lambda g: g / math.log(2),
    "factor": torch.exp,
}
NORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "x / √(Σx² + 1e-6)": lambda x: x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt(),
    "x / max(‖x‖, 1e-12)": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12),
    "x / (‖x‖ + 1e-6)": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-6),
}
MASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "True = attend": lambda m: m,
    "True = hidden": lambda m: ~m,
    "1 = attend": lambda m: m.long(),
}


def draw(heads: int, length: int, seed: int) -> Tensor:
    return torch.randn(2, heads, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def agrees(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None or found.shape != wanted.shape:
        return False
    return bool(torch.allclose(found.float(), wanted.float(), atol=1e-5))


def only(found: list[str]) -> str:
    """The one that held; "" where none or more did."""
    return found[0] if len(found) == 1 else ""


def layouts(layout: str) -> Mapping[str, Callable[[Tensor], Tensor]]:
    return ONE_HEAD if layout in ONE_HEAD else LAYOUTS


def layout(speaker: Speaker, said: str) -> str:
    """In which of the layouts rows are those of the whole zoo."""
    heads = 1 if said in ONE_HEAD else 2
    q, k, v = (draw(heads, LENGTH, seed) for seed in range(3))
    k, found = F.normalize(k, dim=-1), []  # by longer keys a delta rule grows without bound
    for name, turn in layouts(said).items():
        if speaker.attend is None:
            assert speaker.recur is not None
            open_gate = torch.zeros(2, heads, LENGTH, WIDTH)  # as every form of it says
            rows = speaker.recur(turn(q), turn(k), turn(v), decay=turn(open_gate))[0]
            wanted, *_ = of_oracle(speaker, q, k, v, open_gate)
        else:
            assert speaker.attend is not None
            # Causal where it can be asked to be, since some are always.
            words = {"causal"} & set(inspect.signature(speaker.attend).parameters)
            rows = speaker.attend(turn(q), turn(k), turn(v), **dict.fromkeys(words, True))
            wanted = F.scaled_dot_product_attention(q, k, v, is_causal=bool(words))
        found += [name] if agrees(rows, turn(wanted)) else []
    return only(found)


def of_oracle(
    speaker: Speaker, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor
) -> tuple[Tensor, ...]:
    told: dict[str, Any] = {"log_decay": log_decay}
    if speaker.oracle == "rwkv7":
        told["removal_key"] = F.normalize(k, dim=-1)
    elif speaker.oracle != "gla":
        told["l2_norm"] = False
    oracle = attnzoo.oracles.ORACLES[speaker.oracle]
    return oracle(q, k, v, is_causal=True, output_final_state=True, **told)


def read(speaker: Speaker, said: str, queries: int, keys: int, **words: object) -> Tensor:
    """Which keys each row reads, (queries, keys) bool, by values that tell them."""
    assert speaker.attend is not None
    turn = layouts(said)[said]
    v = torch.eye(WIDTH)[:keys].expand(2, 1, -1, -1)
    rows = speaker.attend(
        turn(draw(1, queries, 0)), turn(draw(1, keys, 1)), turn(v.contiguous()), **words
    )
    rows = rows[:, None] if said in ONE_HEAD else turn(rows)
    return rows[0, 0, :, :keys].abs() > 1e-6


def window_keys(speaker: Speaker, said: str) -> int:
    """Keys that the last row reads of a causal window, beyond its number."""
    rows = read(speaker, said, LENGTH, LENGTH, window=WINDOW, causal=True)
    return int(rows[-1].sum()) - WINDOW


def alignment(speaker: Speaker, said: str) -> str:
    """Where the first of three queries stands, of six keys."""
    try:
        rows = read(speaker, said, 3, 6, causal=True)
    except Exception:  # whatever a library refuses with
        return "refused"
    return {1: "first", 4: "last"}.get(int(rows[0].sum()), "")


def mask(speaker: Speaker, said: str, form: str) -> str:
    """The form of a mask, if it hides the keys that it should."""
    seen = torch.ones(2, LENGTH, dtype=torch.bool)
    seen[:, 2], seen[:, 5] = False, False
    rows = read(speaker, said, LENGTH, LENGTH, mask=MASKS[form](seen))
    return form if bool((rows == seen[0]).all()) else ""


def parameters(path: str) -> list[str]:
    """What a function takes, in its order, with its default where it has one: of Python, of what
    tells of itself in its first line alone, or of an operator of onnx."""
    if path.startswith("onnx "):
        from onnx.defs import get_schema

        _, name, opset = path.split()
        return [one.name for one in get_schema(name, int(opset)).inputs]
    function = of(path)
    try:
        told = [str(one) for one in inspect.signature(function).parameters.values()]
    except ValueError:
        words = " ".join(function.__doc__.split(" ->")[0].split())
        told = words[words.index("(") + 1 : words.rindex(")")].split(", ")
    return [one for one in told if one not in ("self", "*")]


def arguments(speaker: Speaker, said: str) -> str:
    """As many first arguments as are claimed, in their order."""
    names = [one.split(":")[0].split("=")[0].strip() for one in parameters(speaker.function)]
    return ", ".join(names[: said.count(",") + 1])


def scale(speaker: Speaker, said: str) -> str:
    """The factor of the scores: given, where it has no default; else that which makes the rows."""
    for one in parameters(speaker.function) if speaker.function else ():
        if one.split(":")[0] in ("scale", "scaling") and "=" not in one:
            return "given"
    heads = 1 if said in ONE_HEAD else 2
    q, k, v = (draw(heads, LENGTH, seed) for seed in range(3))
    turn = layouts(said)[said]
    if speaker.attend is None:
        assert speaker.recur is not None
        k, open_gate = F.normalize(k, dim=-1), torch.zeros(2, heads, LENGTH, WIDTH)
        rows = speaker.recur(turn(q), turn(k), turn(v), decay=turn(open_gate))[0]

        def wanted(factor: float) -> Tensor:  # a recurrence is linear in its queries
            return of_oracle(speaker, q * factor * WIDTH**0.5, k, v, open_gate)[0]
    else:
        words = {"causal"} & set(inspect.signature(speaker.attend).parameters)
        rows = speaker.attend(turn(q), turn(k), turn(v), **dict.fromkeys(words, True))

        def wanted(factor: float) -> Tensor:
            causal = bool(words)
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=factor)

    factors = {"1/√width": WIDTH**-0.5, "1": 1.0}
    return only([one for one, factor in factors.items() if agrees(rows, turn(wanted(factor)))])


def state_dtype(speaker: Speaker, said: str) -> str:
    """Of the state of tensors in half precision."""
    assert speaker.recur is not None
    turn, heads = LAYOUTS[said], 1 if speaker.oracle == "rwkv7" else 2
    q, k, v = (draw(heads, LENGTH, seed).half() for seed in range(3))
    gate = -0.1 - 0.4 * torch.rand(2, heads, LENGTH, WIDTH)
    gate = gate[..., 0] if speaker.oracle == "gated_deltanet" else gate
    if speaker.oracle == "rwkv7":
        q = k = v = k[:1].float()
        gate = gate[:1, :, :1].expand(1, 1, LENGTH, -1).float().exp()
    state = speaker.recur(turn(q), turn(k), turn(v), decay=turn(gate.to(q.dtype)))[1]
    return "as q" if state.dtype == torch.float16 else str(state.dtype)[6:]


def l2_norm(speaker: Speaker, said: str) -> str:
    """What divides by the norm, by vectors of all sizes down to next to nothing; in the words of
    what is claimed where these hold it."""
    x = draw(1, LENGTH, 0) * torch.logspace(-8, 0, LENGTH)[:, None]
    own = of(speaker.norm)(x)
    found = only([one for one, norm in NORMS.items() if torch.allclose(own, norm(x), atol=1e-7)])
    return said if found and found in said else found


def hidden_row(speaker: Speaker, said: str, polarity: str) -> str:
    """What a row is whose keys are all hidden."""
    assert speaker.attend is not None
    turn = layouts(said)[said]
    q, k, v = (draw(1, LENGTH, seed) for seed in range(3))
    hidden = MASKS[polarity](torch.zeros(2, LENGTH, dtype=torch.bool))
    rows = speaker.attend(turn(q), turn(k), turn(v), mask=hidden)
    rows = rows[:, None] if said in ONE_HEAD else turn(rows)
    if bool(rows.isnan().all()):
        return "NaN"
    if not rows.any():
        return "0"
    # What is added to every score takes digits of it away.
    if bool((rows - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-2):
        return "as without a mask"
    return "mean of v" if agrees(rows, v.mean(2, keepdim=True).expand(v.shape)) else ""


def gates(speaker: Speaker, said: str) -> tuple[str, str]:
    """The form of a gate, and the axes of the state."""
    assert speaker.recur is not None
    turn = LAYOUTS[said]
    if speaker.oracle == "rwkv7":  # one head, one input for all, one decay for all tokens
        q = k = v = draw(1, LENGTH, 0)[:1]
        gate = -0.1 - 0.4 * torch.rand(WIDTH).expand(1, 1, LENGTH, -1)
    else:
        q, k, v = (draw(2, LENGTH, seed) for seed in range(3))
        k = F.normalize(k, dim=-1)
        v = torch.cat([v, v[..., :3]], -1)
        gate = -torch.rand(2, 2, LENGTH, WIDTH)
        gate = gate[..., 0] if speaker.oracle == "gated_deltanet" else gate
    rows, _, state = of_oracle(speaker, q, k, v, gate)
    forms, axes = [], []
    for name, spell in DECAYS.items():
        try:
            out, after = speaker.recur(turn(q), turn(k), turn(v), decay=turn(spell(gate)))
        except Exception:
            continue
        turned = {"width value_dim": after, "value_dim width": after.mT}
        held = [one for one, x in turned.items() if agrees(x, state)]
        if held and (out is None or agrees(turn(out), rows)):
            forms.append(name)
            axes += held
    return only(forms), only(axes)
