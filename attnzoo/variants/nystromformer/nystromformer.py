"""Nyströmformer: softmax's matrix rebuilt from a few of its rows and columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnzoo.arguments import check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import Cost, Shape, accumulation_dtype
from attnzoo.engines.softmax.reference import masked_softmax
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.registry import register
from attnzoo.variants.nystromformer.landmark_cost import landmark_cost
from attnzoo.variants.nystromformer.landmarks import pseudo_inverse, segment_means


@register
class Nystromformer(Attention):
    """Nyströmformer (Xiong et al. 2021, equations 13 to 16; algorithm 1).

        A = softmax(s·Q K̃ᵀ) · softmax(s·Q̃ K̃ᵀ)⁺ · softmax(s·Q̃ Kᵀ),    s = 1/√d

    Q̃ and K̃ are num_landmarks means of consecutive queries and keys, so A has that rank. The
    pseudo-inverse ⁺ is taken by a few steps of Z ← ¼ Z (13 I − B Z (15 I − B Z (7 I − B Z))) from Z
    = Bᵀ / (‖B‖₁ ‖B‖_∞), each matrix with norms of its own. What is kept is the coarse shape of
    softmax's A, with all lengths trained from softmax's own projections; what is lost is any weight
    on a single key that its segment does not share, positive entries, rows that sum to 1, and
    causality, since a landmark holds the future. Use it in encoders of long, smooth input; not
    where one token must be found.

    num_landmarks: number of segments whose means are the landmarks; they are cut by counting real
        tokens, so that padding moves none
    iterations: number of steps of the pseudo-inverse
    convolution: size, an odd number, of a learned depthwise convolution of v along the length that
        is added to the output (figure 4); None: there is none
    scale: s, the factor of the scores, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="nystromformer",
        title="Nyströmformer",
        paper="Xiong et al., Nyströmformer: A Nyström-Based Algorithm for Approximating "
        "Self-Attention, 2021, arXiv:2102.03902",
        equation="A = softmax(Q K̃ᵀ/√d) softmax(Q̃ K̃ᵀ/√d)⁺ softmax(Q̃ Kᵀ/√d), Q̃ and K̃: means of "
        "segments",
        complexity="O(n·m) time and memory",
        family="low_rank",
        exact=False,
        causal=False,
        cross=False,
        decodes=False,
    )
    engine: Softmax

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        num_landmarks: int = 64,
        iterations: int = 6,
        convolution: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(heads, head_dim, Softmax(scale), backend=backend)
        self.num_landmarks, self.iterations = (
            check_positive("num_landmarks", num_landmarks),
            check_positive("iterations", iterations),
        )
        self.convolution = None
        if convolution is not None:
            if check_positive("convolution", convolution) % 2 == 0:
                raise ValueError(
                    f"convolution={convolution} must be odd: the token itself and as many on each "
                    "side"
                )
            self.convolution = nn.Conv2d(
                heads,
                heads,
                (convolution, 1),
                padding=(convolution // 2, 0),
                groups=heads,
                bias=False,
            )

    def attend(self, call: Call, backend: str, state: Any = None) -> tuple[Tensor, str, Any]:
        segments, dtype = (
            min(self.num_landmarks, int(call.key_length)),
            accumulation_dtype(call.q.dtype),
        )
        q_landmarks, filled = segment_means(call.q, segments, call.key_mask)
        k_landmarks = repeat_heads(segment_means(call.k, segments, call.key_mask)[0], call.group)
        inverse = self._pseudo_inverse(q_landmarks.to(dtype), k_landmarks.to(dtype), filled)
        of_landmarks = call.over(q_landmarks, call.k, call.v, call.key_mask)
        seen_by_landmarks, _, _ = self.engine(of_landmarks, backend)
        values = (inverse @ seen_by_landmarks.to(dtype)).to(call.q.dtype)
        out, name, _ = self.engine(call.over(call.q, k_landmarks, values, filled), backend)
        if self.convolution is None:
            return out, name, None
        near = self.convolution(repeat_heads(call.v, call.group).to(self.convolution.weight.dtype))
        return out + near.to(out.dtype), name, None

    def _pseudo_inverse(self, q: Tensor, k: Tensor, filled: Tensor | None) -> Tensor:
        """softmax(s·Q̃ K̃ᵀ)⁺, (batch, heads, segments, segments), 0 in the rows and columns of
        empty segments."""
        scores = q @ k.mT * self.engine.scale_of(q)
        if filled is not None:
            scores = scores.masked_fill(
                ~(filled[:, None, :, None] & filled[:, None, None, :]), float("-inf")
            )
        return pseudo_inverse(masked_softmax(scores), self.iterations)

    def count(self, shape: Shape) -> Cost:
        kernel_size = 0 if self.convolution is None else self.convolution.kernel_size[0]
        segments = min(self.num_landmarks, shape.key_length)
        return landmark_cost(shape, segments, self.iterations, kernel_size)

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        return {} if self.convolution is None else {"convolution_weight": self.convolution.weight}
