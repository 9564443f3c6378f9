"""The way back through chunks of tokens: gradients from those of their rows and of the last state.

The gate of token m lets fade what is left of every token j < m at every token i ≥ m. A product that
fades so is, up to its sign, the derivative of its exponent; so a gate's gradient is the sum over
the tokens from m on of q·dq and (beta k)·d(beta k) less k·dk, where these are gradients of the
tokens as readers and as keys, and no product between tokens is needed for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.linear.gated.fading import HeadFading
from attnzoo.engines.linear.gated.gated_chunks import Inside, States, Tokens, of_chunks
from attnzoo.engines.linear.gated.tokens import Rule, inverse_length

Gradients = dict[str, Tensor]


def through_states(
    inside: Inside, d_rows: Tensor, state: Tensor, d_after: Tensor | None
) -> tuple[Gradients, Tensor]:
    """Gradients of the tensors of `Inside` by name, and of the state before the first chunk.

    d_rows: gradient of its rows
    state: before the first chunk
    d_after: gradient of the state after the last chunk; None when nothing reads it
    """
    inverse, kept, chunks = inside.solved(), inside.kept, d_rows.shape[0]
    states = States.of(inside, inverse, state, remember=False)
    before, writes = states.before, states.writes
    d_writes = inside.scores.mT @ d_rows
    # Of the state before each chunk, and after the last.
    d_states = state.new_empty(chunks + 1, *state.shape)
    torch.matmul(inside.reads.mT, d_rows, out=d_states[:chunks])
    d_states[chunks] = 0 if d_after is None else d_after
    d_values = d_writes if inverse is None else torch.empty_like(d_writes)
    handed_on, kept_ = of_chunks(inside.handed_on), of_chunks(kept)
    erases, solved = of_chunks(inside.erases), of_chunks(inverse)
    of_writes, of_values, of_states = (of_chunks(x) for x in (d_writes, d_values, d_states))
    for chunk in reversed(range(chunks)):
        d_before, d_later, d_write = of_states[chunk], of_states[chunk + 1], of_writes[chunk]
        d_write.baddbmm_(handed_on[chunk], d_later)
        d_before.addcmul_(d_later, kept_[chunk]) if kept_ else d_before.add_(d_later)
        if solved:
            torch.bmm(solved[chunk].mT, d_write, out=of_values[chunk])
            d_before.baddbmm_(erases[chunk].mT, of_values[chunk], alpha=-1)
    d_later = d_states[1:]
    found = {
        "scores": d_rows @ writes.mT,
        "reads": d_rows @ before.mT,
        "handed_on": writes @ d_later.mT,
        "values": d_values,
    }
    if kept is not None:
        of_kept = (before * d_later).sum(-1, keepdim=True)
        found["kept"] = of_kept if kept.shape[-2] > 1 else of_kept.sum(-2, keepdim=True)
    if inverse is not None:
        found["erases"] = (d_values @ before.mT).neg_()
        found["below"] = (d_values @ writes.mT).neg_().tril_(-1)
    return found, d_states[0]


def through_inside(tokens: Tokens, inside: Inside, found: Gradients) -> Gradients:
    """Gradients of q, k, v and the gates, laid out as in `Tokens`, and the sums over the width
    of q·dq and k·dk.

    found: gradients of the tensors of `inside` by name, which are overwritten
    """
    q, k, v, beta, fading = tokens.q, tokens.k, tokens.v, tokens.beta, tokens.fading
    counts = q.shape[3:5]
    rows, d_products = [q], [found["scores"].unflatten(3, counts)]
    d_carried = [found["reads"].unflatten(3, counts)]
    if tokens.stronger is not None:
        rows.append(tokens.stronger[..., None, :, :])
        d_products.append(found["below"][:, :, :, None])
        d_carried.append(found["erases"][:, :, :, None])
    (d_q, *others), d_k = fading.through(rows, k, d_products, d_carried, found["handed_on"])
    of_q, of_k = q * d_q, k * d_k
    exponents = of_q.sum(3).sub_(of_k)  # of every channel, by token
    made = {"q": d_q, "k": d_k, "v": found["values"], "q·dq": of_q.sum(-1)}
    made["k·dk"] = of_k.sum(-1)
    if tokens.stronger is not None:
        d_stronger = others[0][:, :, :, 0]
        of_stronger = k * d_stronger
        if beta is None:
            made["k"], made["k·dk"] = d_k.add_(d_stronger), made["k·dk"] + of_stronger.sum(-1)
            exponents.add_(of_stronger)
        else:
            strength = beta[..., None]
            turned = of_stronger.sum(-1)
            made["beta"] = turned + (v * found["values"]).sum(-1)
            made["v"] = found["values"] * strength
            made["k"] = d_k.addcmul_(d_stronger, strength)
            made["k·dk"] = made["k·dk"] + beta * turned
            exponents.addcmul_(of_stronger, strength)
    if inside.kept is not None:
        exponents[..., -1, :] += (found["handed_on"] * inside.handed_on).sum(-2)
        of_kept = (found["kept"] * inside.kept)[..., 0]  # (width,), or one number for the head
        made["log_decay"] = _through_gates(exponents, of_kept, isinstance(fading, HeadFading))
    return made


def _through_gates(exponents: Tensor, of_kept: Tensor, by_head: bool) -> Tensor:
    """Gradient of log_decay, (..., length) by head and else (..., length, width).

    exponents: (..., length, width), overwritten: gradients of the gates' sums up to each token
    of_kept: that of the sum of all, which lets the state before the chunk fade
    """
    if by_head:
        exponents = exponents.sum(-1, keepdim=True)
    exponents[..., -1, :] += of_kept
    found = exponents.flip(3).cumsum(3).flip(3)
    return found[..., 0] if by_head else found


def through_prepared(rule: Rule, call: Call, made: Gradients) -> Gradients:
    """Gradients of q, k, v, log_decay and beta of a span, cut as the call is.

    call: of `gated_chunks.in_chunks` in the precision of sums, before `tokens.prepared`
    made: of `through_inside`
    """
    found = {**made, **{name: made[name].flatten(2, 3) for name in ("q", "q·dq")}}
    scale = int(call.q.shape[-1]) ** -0.5 if rule.scale is None else rule.scale
    for name, x, factor in (("q", call.q, scale), ("k", call.k, 1.0)):
        if rule.l2_norm:
            length_ = inverse_length(x)
            along = found[f"{name}·d{name}"][..., None] * length_.square()
            found[name] = found[name].mul(length_ * factor).addcmul_(x, along, value=-1)
        elif factor != 1:
            found[name] = found[name] * factor
    log_decay = call.get("log_decay")
    if log_decay is not None:  # a closed gate stays closed
        found["log_decay"] = found["log_decay"].masked_fill(log_decay == -torch.inf, 0.0)
    return found
