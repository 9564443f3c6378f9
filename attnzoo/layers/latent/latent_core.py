"""Attention whose keys and values are made of one latent vector a token, by two equal ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo import execution
from attnzoo.arguments import check_choice, check_positive
from attnzoo.attention import LEAF, Attention
from attnzoo.autocast import autocast_inputs_only
from attnzoo.call import Call, UnsupportedError
from attnzoo.call_checks import check
from attnzoo.engines.engine import Cost, Engine, Shape, StateSizes
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.layers.latent.latent_cost import cost_of
from attnzoo.layers.projections import is_plain
from attnzoo.spec_checks import check_decodes, check_features

Form = Literal["auto", "expanded", "absorbed"]
FORMS = ("auto", "expanded", "absorbed")


class LatentCore(Attention):
    """Any attention of the zoo over keys [k^R_t, W_k c_t] and values W_v c_t of each head.

        q · [k^R, W_k c] = [q^R, W_kᵀ q^C] · [k^R, c],    A (W_v c) = W_v (A c)

    Expanded, keys and values of every head are made, as on the left; absorbed, W_k goes into the
    queries and W_v behind the rows, and all heads share the keys [k^R, c] and the values c. Both
    are equal. Decoding keeps [k^R, c] alone. `absorbs` says whether the attention reads keys
    through their products with queries alone, as softmax does; one that does not is given expanded
    keys and values, and decodes with its own state.

    core: an attention of heads as wide as q
    rope_width: of k^R
    rank: of c
    value_width: of a head's values
    form: "auto" takes the form with fewer multiply-accumulates

    Source: DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1 and appendix C.
    """

    def __init__(
        self, core: Attention, rope_width: int, rank: int, value_dim: int, form: Form = "auto"
    ) -> None:
        nn.Module.__init__(self)
        self.__module__ = LEAF
        self.core = core
        self.spec = core.spec  # pyright: ignore[reportAttributeAccessIssue]
        self.heads, self.head_dim, self.backend = core.heads, core.head_dim, core.backend
        self.rope_width = rope_width
        self.rank = check_positive("kv_lora_rank", rank)
        self.value_dim = check_positive("v_head_dim", value_dim)
        check_choice("form", form, FORMS)
        if form == "absorbed" and not self.absorbs:
            raise UnsupportedError(
                f"form='absorbed' puts products of keys and queries in place of keys, and "
                f"{core.spec.name} reads keys otherwise; leave form='auto', or use "
                "attention='standard'"
            )
        self.form: Form = form
        self.last_backend: str | None = None
        features = core.heads * (self.key_dim + value_dim)
        self.kv_up = nn.Linear(rank, features, bias=False)

    @property
    def engine(self) -> Engine:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.core.engine

    @property
    def key_dim(self) -> int:
        """Features of a head that are not turned."""
        return self.head_dim - self.rope_width

    @property
    def kept_width(self) -> int:
        """Numbers that decoding keeps of a token."""
        return self.rope_width + self.rank

    @property
    def absorbs(self) -> bool:
        """Whether a key may be any vector with the same products with queries."""
        spec = self.core.spec
        by_products = isinstance(self.core.engine, SoftmaxReference) and self.core.packs
        return spec.exact and by_products and not spec.data_dependent

    @property
    def packs(self) -> bool:
        return self.core.packs

    def value_width(self, call: Call) -> int:
        return self.value_dim

    def refuse(self, call: Call) -> None:
        check(call, self.spec, self.heads, self.head_dim, self.kept_width)
        check_features(call, self.spec)

    @autocast_inputs_only
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        """As `Attention.forward`.

        q: (batch, heads, query_length, rope_width + key_dim), [q^R, q^C]
        k: (batch, 1, key_length, rope_width + rank), [k^R, c]
        v: (batch, 1, key_length, 0), empty, since values are made of k
        returns: (batch, heads, query_length, value_dim)
        """
        if self.absorbs:
            return super().forward(q, k, v, **how)
        out = self.core(q, *self._expanded(k), **how)
        self.last_backend = f"expanded {self.core.last_backend}"
        return out

    @autocast_inputs_only
    def weights(self, q: Tensor, k: Tensor, **how: Any) -> Tensor:
        """As `Attention.weights`, of `forward`'s q and k."""
        if self.absorbs:
            return super().weights(q, k, **how)
        return self.core.weights(q, self._expanded(k)[0], **how)

    @autocast_inputs_only
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **how: Any) -> tuple[Tensor, Any]:
        """As `Attention.step`, of `forward`'s q, k and v."""
        if self.absorbs:
            return super().step(q, k, v, state, **how)
        out, state = self.core.step(q, *self._expanded(k), state, **how)
        self.last_backend = f"expanded {self.core.last_backend}"
        return out, state

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        kv_heads: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """As `Attention.init_state`."""
        if not self.absorbs:
            return self.core.init_state(batch_size, max_length, dtype=dtype, device=device)
        check_decodes(self.spec)
        check_positive("batch_size", batch_size)
        if max_length is not None:
            check_positive("max_length", max_length)
        dtype = dtype or torch.get_default_dtype()
        sizes = StateSizes(batch_size, 1, self.kept_width, max_length, dtype, device, value_dim=0)
        core: Any = self
        return execution.first_state(core, sizes)

    def attend(self, call: Call, backend: str, state: Any = None) -> tuple[Tensor, str, Any]:
        engine = self.core.engine
        if state is not None:
            call, state = engine.with_past(call, state)
        form = self.form_of(call.query_length, call.key_length)
        made = self._formed(call, form)
        if state is None:
            out, name, _ = self.core.attend(made, backend)
        else:
            chosen = engine.choose(made, backend)
            out, name = chosen.run(engine, made), chosen.name
        return self._rows(out, form), f"{form} {name}", state

    def matrix(self, call: Call) -> Tensor:
        form = self.form_of(call.query_length, call.key_length)
        return self.core.matrix(self._formed(call, form))

    def form_of(self, query_length: int, key_length: int) -> Literal["expanded", "absorbed"]:
        """The form of a call of these lengths: of fewer multiply-accumulates, or as it was built.
        What calls for kv_up itself (an adapter, a hook) is expanded."""
        if self.form != "auto":
            return self.form
        if not self.absorbs or not is_plain(self.kv_up):
            return "expanded"
        both = self.rank * (self.key_dim + self.value_dim)
        pair = 2 * max(self.head_dim, self.value_dim)
        expanded = key_length * both + query_length * key_length * pair
        absorbed = query_length * both + query_length * key_length * 2 * self.kept_width
        return "absorbed" if absorbed < expanded else "expanded"

    def cost(
        self,
        batch_size: int,
        query_length: int,
        key_length: int | None = None,
        *,
        kv_heads: int | None = None,
        is_causal: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        """As `Attention.cost`, with what expanding and absorbing take."""
        if kv_heads not in (None, 1):
            raise ValueError(
                f"kv_heads={kv_heads} is no choice here: all heads share one latent; leave it out"
            )
        if not self.absorbs and self.value_dim != self.head_dim:
            raise UnsupportedError(
                f"{self.spec.name} has a closed form for values as wide as keys, and v_head_dim is "
                f"{self.value_dim} beside {self.head_dim}; count with attnzoo.count_flops instead"
            )
        return super().cost(batch_size, query_length, key_length, is_causal=is_causal, dtype=dtype)

    def count(self, shape: Shape) -> Cost:
        return cost_of(self, shape)

    def keep_heads(self, first: int, count: int) -> None:
        raise UnsupportedError(
            "the heads of a latent layer are not spread over processes: keep the layer whole"
        )

    def _formed(self, call: Call, form: str) -> Call:
        """The call as the engine gets it, in a form. Values are as wide as keys, so that fused
        kernels take them."""
        if form == "absorbed":
            # Whole keys in place of c, the last features of each: one tensor, and one width.
            return replace(call, q=self._absorbed(call.q), k=call.k, v=call.k)
        k, v = self._expanded(call.k)
        width = max(k.shape[3], v.shape[3])
        q, k, v = (
            F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (call.q, k, v)
        )
        return replace(call, q=q, k=k, v=v)

    def _rows(self, out: Tensor, form: str) -> Tensor:
        """The rows of a form's call, (batch, heads, query_length, value_dim)."""
        if form == "expanded":
            return out[..., : self.value_dim]
        latent = out[..., self.rope_width :]
        return _by_head(latent, self._up(out.dtype)[:, self.key_dim :].mT)

    def _up(self, dtype: torch.dtype) -> Tensor:
        """W_k and below it W_v of every head, (heads, key_dim + value_dim, rank)."""
        return self.kv_up.weight.to(dtype).view(self.heads, -1, self.rank)

    def _absorbed(self, q: Tensor) -> Tensor:
        """[q^R, W_kᵀ q^C], (batch, heads, query_length, rope_width + rank)."""
        turned, other = q.split([self.rope_width, self.key_dim], -1)
        return torch.cat([turned, _by_head(other, self._up(q.dtype)[:, : self.key_dim])], -1)

    def _expanded(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [k^R, W_k c] and values W_v c of every head, (batch, heads, key_length, ...)."""
        turned, latent = kept.split([self.rope_width, self.rank], -1)
        latent = latent[:, 0]
        if is_plain(self.kv_up):
            up = F.linear(latent, self.kv_up.weight.to(latent.dtype))
        else:
            up = self.kv_up(latent).to(latent.dtype)
        up = up.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = up.split([self.key_dim, self.value_dim], -1)
        return torch.cat([turned.expand(-1, self.heads, -1, -1), k], -1), v

    def extra_repr(self) -> str:
        sizes = f"rope_width={self.rope_width}, rank={self.rank}, value_dim={self.value_dim}"
        return f"{sizes}, form={self.form!r}"


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Every head of x, (batch, heads, length, features), times its own matrix, (heads, features,
    others), which is not copied for each sample."""
    batch, heads, length, features = x.shape
    together = x.transpose(0, 1).reshape(heads, batch * length, features)
    return torch.bmm(together, weight).view(heads, batch, length, -1).transpose(0, 1)
