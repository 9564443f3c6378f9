"""Reformer: softmax over the keys that hash to the query's bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnzoo.arguments import check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call, UnsupportedError
from attnzoo.registry import register
from attnzoo.variants.reformer.angular_hash import AngularHash
from attnzoo.variants.reformer.bucket_softmax import BucketSoftmax


@register
class Reformer(Attention):
    """LSH attention (Kitaev et al. 2020, section 2, equations 4 to 6).

        A_ij = exp(s_ij) / Σ_{l ∈ P(i)} exp(s_il) if j ∈ P(i), else 0, P(i) = {i} ∪ ⋃_r {j :
            h_r(k_j) = h_r(q_i), chunks of j and i near}

    In hash round r a token's bucket is h_r(x) = argmax [xR_r, −xR_r]: tokens of nearly one
    direction meet. Every bucket is cut into chunks of chunk_size real tokens in order of position;
    a query sees its own chunk and the one before it (not causal, the one after too), and its own
    position. P is the union of the rounds as a set, which is what the paper's N_ij restores.
    Softmax is exact on P; a large score outside it is lost, with a chance that falls with every
    round. Scores: a few times n·rounds·chunk_size instead of n².

    The paper sorts tokens by bucket and cuts the whole row into equal chunks: there a later token,
    or padding, moves the borders, and so decides what an earlier one sees, its causal form
    included. Here ranks within the bucket settle the chunks; the price is tiles that are partly
    empty. Without share_qk a query of a bucket stands where the last key at or before it does, so
    that decoding sees what the forward saw.

    Use it at lengths far above 3·rounds·chunk_size, in models trained with it. Swapped into a
    pretrained decoder, 4 rounds see about two of five heaviest keys and one of seven of the top 32,
    which a window does better (docs/results/selection.md). Decoding keeps all keys, and of each
    its bucket and its rank in it, 8 bytes a round. Sorting and masks outweigh the products: on a
    CPU SDPA was faster at every length up to 16,384 causal tokens.

    num_buckets: an even number, or 1; in the paper about 2·length/chunk_size, here fixed, so that
        no row changes as the sequence grows. Several such numbers are hashed one by one, for as
        many buckets as their product: [256, 128] names 32,768 buckets by 192 directions
    num_hashes: number of hash rounds
    chunk_size: number of tokens in a chunk of a bucket
    share_qk: the paper's form: k is q (pass one tensor), keys are scaled to length 1 and a token
        sees itself only if it sees nothing else
    seed: draws the rotations R, which are kept in state_dict; see `redraw`
    scale: factor of the scores, 1/sqrt(head_dim) by default, or 1 with share_qk
    """

    spec = Spec(
        name="reformer",
        title="Reformer (LSH attention)",
        paper="Kitaev et al., Reformer: The Efficient Transformer, 2020, arXiv:2001.04451",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{l∈P(i)} exp(q_i·k_l/√d), "
        "j ∈ P(i): same bucket in some hash round, near in it",
        complexity="O(n·(r·c + log n)) time, O(n·c) memory",
        family="sparse",
        exact=True,
        data_dependent=True,
    )
    engine: BucketSoftmax

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        num_buckets: int | Sequence[int] = 32,
        num_hashes: int = 4,
        chunk_size: int = 64,
        share_qk: bool = False,
        seed: int = 0,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        hashing = AngularHash(check_positive("head_dim", head_dim), num_buckets, num_hashes, seed)
        super().__init__(
            heads,
            head_dim,
            BucketSoftmax(hashing, chunk_size, share_qk=share_qk, scale=scale),
            backend=backend,
        )
        if share_qk:
            self.projected = ("qk", "v")

    def refuse(self, call: Call) -> None:
        super().refuse(call)
        if self.engine.share_qk and call.k is not call.q:
            raise UnsupportedError(
                "reformer with share_qk=True has one projection for queries and keys: pass the "
                "same tensor as q and k, or build with share_qk=False"
            )

    def redraw(self, seed: int | None = None) -> None:
        """Draw new rotations, in place. seed=None takes one from torch's global generator, so
        torch.manual_seed repeats it."""
        self.engine.hashing.redraw(int(torch.randint(2**31, ())) if seed is None else seed)

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        return {"rotations": self.engine.hashing.rotations}
