"""The engine of forgetting attention: softmax with gates on its scores."""

from __future__ import annotations

from dataclasses import replace

from attnzoo.call import Call
from attnzoo.engines.engine import Backend, Cost, Shape
from attnzoo.engines.linear.gated.tokens import check_gates
from attnzoo.engines.softmax import rows, sdpa
from attnzoo.engines.softmax.decay_bias import LOG_DECAY
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.reference import REFERENCE
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.variants.forgetting import fading_tiles


class FadingSoftmax(Softmax):
    """Softmax attention whose scores fade by `log_decay`.

    Its backends in order: `native_row`, one query in C++, where that has been compiled; `tiles` on
    a CPU, which reads only what has not faded; `sdpa`, torch's, with the gates' sums as a mask of
    n² numbers; `rows`, a few rows of them at a time; the reference.
    """

    remembered = (LOG_DECAY,)
    backends = (
        one_row.backend(),
        Backend("tiles", fading_tiles.attend, fading_tiles.why_not),
        Backend("sdpa", sdpa.attend, sdpa.cannot, packs=True),
        Backend("rows", rows.attend, rows.why_not),
        replace(REFERENCE, packs=True),
    )

    def check_inputs(self, call: Call) -> None:
        check_gates(call)

    def cost(self, shape: Shape) -> Cost:
        """Of a call whose gates let nothing fade below rounding."""
        found = super().cost(shape)
        gates = shape.batch_size * shape.heads * shape.key_length
        size = shape.dtype.itemsize
        return replace(
            found,
            moved_bytes=found.moved_bytes + gates * size,
            state_elements=found.state_elements + gates,
            state_bytes=found.state_bytes + gates * size,
            state_growth=found.state_growth + shape.batch_size * shape.heads * size,
        )
