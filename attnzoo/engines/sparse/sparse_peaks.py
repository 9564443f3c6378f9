"""The most that torch's allocator holds in the sparse engine, in bytes, by the backend `blocks`,
without masks in the call. In half precision torch's SDPA does the work of `in_cache`, and the forms
are coarser.

Beside tensors as long as the sequence: the memory that pieces use in turn, taken in the order of
the pieces and counted with the old place while it grows, and the caps of pieces. What is smaller,
such as indices of blocks, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnzoo.engines import peaks
from attnzoo.engines.engine import Shape
from attnzoo.engines.softmax import tiles
from attnzoo.engines.sparse import blocks as sparse_blocks
from attnzoo.engines.sparse import columns_memory, dilated, sparse_memory
from attnzoo.engines.sparse import windows as sparse_windows
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.window import Window

# Bytes a score while a band is drawn: two distances as int64, and whether they are short enough
POSITIONS = 17


@dataclass(frozen=True)
class _Pieces:
    """What one head computes: shapes (parts, rows, keys) in order, and those among them whose keys
    are fetched; bytes of all caps, and the most while they are drawn."""

    shapes: list[tuple[int, int, int]]
    fetched: set[tuple[int, int, int]]
    cap_bytes: int
    drawing_bytes: int


def windows(
    pattern: Window,
    shape: Shape,
    columns: int = 0,
    global_queries: int = 0,
    *,
    logits: bool = False,
) -> tuple[int, int]:
    """Peaks of a forward and of both passes. columns: keys beside the window, sinks or global
    tokens; global_queries: whose rows are made anew. logits: as in `sparse_memory.windows`.

    The heads of every dilation by themselves: their copies of q, k and v, classes of positions
    folded into the batch, the outputs so far."""
    parts, plain = dilated.parts(pattern, shape), replace(pattern, dilation=1)
    forward = training = done = held = 0
    for part in parts:
        own = replace(shape, heads=part.heads, kv_heads=part.kv_heads)
        copies = own.input_bytes if len(parts) > 1 else 0
        folded = part.shape.input_bytes if part.fold else 0
        longer = replace(part.shape, key_length=part.shape.key_length + columns)
        copies += folded + (2 * longer.key_bytes if columns else 0)
        its_forward, its_training = _window(plain, part.shape, columns, logits=logits)
        unfolding = 2 * part.shape.query_bytes if part.fold else 0
        forward = max(forward, done + copies + max(its_forward, unfolding))
        returned = (
            part.shape.query_bytes if part.fold else 0
        )  # what comes back to the output, folded
        if global_queries:  # what comes back over global rows; from those to q, k and v
            returned = 2 * shape.query_bytes + 2 * shape.key_bytes
        training = max(training, held + copies + returned + its_training)
        done, held = done + own.query_bytes, held + copies + own.query_bytes
    if len(parts) > 1:  # all heads side by side, then in order
        forward, training = (
            max(forward, 3 * shape.query_bytes),
            max(training, held + shape.query_bytes + shape.input_bytes),
        )
    if global_queries:
        forward = max(
            forward, shape.query_bytes + peaks.forward(replace(shape, query_length=global_queries))
        )
    looking = peaks.looking_bytes(shape)
    return max(forward, looking), max(training, looking)


def _window(pattern: Window, shape: Shape, columns: int, *, logits: bool) -> tuple[int, int]:
    """Of a plain window."""
    if shape.dtype not in tiles.DTYPES:
        return _by_sdpa(pattern, shape, columns, logits=logits)
    grid, size = (
        Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal),
        shape.dtype.itemsize,
    )
    found, shapes, caps, drawing = sparse_windows.plan(pattern, grid), [], 0, 0
    for first, end, low, high in sparse_windows.edges(pattern, grid):
        keys, start = high - low, grid.offset + first
        for rows in _split(
            end - first, max(sparse_windows.BLOCK, tiles.SCORES // max(1, keys + columns))
        ):
            hidden = _hidden(pattern, grid, start, start + rows, low, high)
            drawing = max(drawing, caps + rows * max(hidden, default=0) * POSITIONS)
            caps += rows * sum(hidden) * size
            start += rows
            shapes.append((1, rows, keys + columns))
    hidden = _hidden(
        pattern, grid, found.before, found.before + sparse_windows.BLOCK, 0, found.slice_length
    )
    drawing = max(drawing, caps + sparse_windows.BLOCK * max(hidden, default=0) * POSITIONS)
    caps += sparse_windows.BLOCK * sum(hidden) * size
    together = tiles.parts_at_a_time(sparse_windows.BLOCK, found.slice_length + columns)
    shapes += [
        (blocks, sparse_windows.BLOCK, found.slice_length + columns)
        for blocks in _split(found.blocks, together)
    ]
    longer = replace(shape, key_length=shape.key_length + columns)
    fetched = set(shapes) if columns else set()
    return _peaks(
        shape,
        _Pieces(shapes, fetched, caps, drawing),
        shape.query_bytes,
        longer.key_bytes,
        padded=0,
    )


def _by_sdpa(pattern: Window, shape: Shape, columns: int, *, logits: bool) -> tuple[int, int]:
    """In half precision: a piece's output beside that of all, its keys and values as oneDNN packs
    them, and copied with columns; where heads share keys, its queries and its output laid out anew.
    With logits, scores in the precision of sums."""
    out, statistic = shape.query_bytes, peaks.statistic_bytes(shape)
    held = 2 * out + statistic + (2 * out if shape.heads > shape.kv_heads else 0)
    kept = (
        columns_memory.beside(pattern, shape, columns, logits=logits)
        if columns or logits
        else held - out
    )
    whole, some = (
        _most_at_a_time(pattern, shape, columns, logits=logits, recording=recording)
        for recording in (False, True)
    )
    return held + whole, max(held + some, out + kept + 2 * out + 2 * shape.key_bytes + some)


def _most_at_a_time(
    pattern: Window, shape: Shape, columns: int, *, logits: bool, recording: bool
) -> int:
    """Of the pieces of `_by_sdpa`; with columns or logits samples go one by one."""
    size, most, samples = shape.dtype.itemsize, 0, 1 if columns or logits else shape.batch_size
    for parts, rows, width in columns_memory.pieces(pattern, shape, recording=recording):
        keys = 2 * samples * shape.kv_heads * parts * (width + columns) * shape.head_dim * size
        pairs = parts * rows * (width + columns)
        if logits:
            most = max(most, keys + 4 * shape.heads * pairs * shape.sum_bytes)
            continue
        masks = pairs * shape.heads // shape.kv_heads * (size + 1)
        drawing = POSITIONS * rows * width - shape.query_bytes  # before a piece has its output
        packed = (
            keys if recording or not columns else 2 * keys + masks
        )  # autograd holds the copies that columns take
        most = max(most, packed, drawing)
    return most


def _hidden(pattern: Window, grid: Grid, first: int, end: int, low: int, high: int) -> list[int]:
    """Lengths of the runs of keys that some row does not see, rows and keys by their positions."""
    seen_from, seen_to = end - pattern.window, first + (1 if grid.is_causal else pattern.window)
    ends = (
        [(low, min(seen_from, high)), (max(seen_to, low), high)]
        if seen_from < seen_to
        else [(low, high)]
    )
    return [stop - start for start, stop in ends if start < stop]


def blocks(pattern: BlockPattern, shape: Shape) -> tuple[int, int]:
    """As `windows`."""
    grid, size, element = (
        Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal),
        pattern.block_size,
        shape.dtype.itemsize,
    )
    ahead, spare = grid.offset % size, -grid.key_length % size
    shapes, fetched = [], set()
    for run in sparse_blocks.runs(pattern, grid):
        keys = grid.key_length if run.sees_all else run.width * size
        rows = run.end - run.first
        if not keys:
            continue
        if run.sees_all:  # rows of several blocks make one part
            shapes += [
                (1, count * size, keys)
                for count in _split(rows, max(1, tiles.SCORES // (size * keys)))
            ]
            continue
        gathered = [
            (count, size, keys) for count in _split(rows, tiles.parts_at_a_time(size, keys))
        ]
        shapes += gathered
        fetched.update(gathered)
    per_position = shape.batch_size * shape.head_dim * element
    query_bytes = shape.heads * (ahead + shape.query_length + spare) * per_position
    key_bytes = shape.kv_heads * (shape.key_length + spare) * per_position
    copies = (query_bytes if ahead or spare else 0) + (2 * key_bytes if spare else 0)
    table = sparse_blocks.sorted_key_blocks(pattern, grid).nbytes
    if shape.dtype not in tiles.DTYPES:
        return _blocks_by_sdpa(pattern, shape, copies + table, query_bytes, key_bytes)
    return _peaks(
        shape,
        _Pieces(shapes, fetched, size * size * element, 0),
        query_bytes,
        key_bytes,
        padded=copies,
        held=table,
    )


def _blocks_by_sdpa(
    pattern: BlockPattern, shape: Shape, held: int, query_bytes: int, key_bytes: int
) -> tuple[int, int]:
    """In half precision: the keys and values of some blocks of one head, fetched and as oneDNN
    packs them; in training of all its sparse_blocks."""
    grid, size = (
        Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal),
        pattern.block_size,
    )
    per_number = shape.batch_size * shape.head_dim * shape.dtype.itemsize
    some = every = 0
    for run in sparse_blocks.runs(pattern, grid):
        keys = grid.key_length if run.sees_all else run.width * size
        if run.sees_all or not keys:
            some = max(some, 2 * keys * per_number)
            continue
        together = max(
            1, min(run.end - run.first, sparse_blocks.GATHERED // (keys * shape.head_dim))
        )
        some, every = (
            max(some, 4 * together * keys * per_number),
            max(every, 4 * (run.end - run.first) * keys * per_number),
        )
    forward = held + query_bytes + query_bytes // shape.heads + some
    kept = sparse_memory.blocks(pattern, shape) - (0 if held > query_bytes else shape.input_bytes)
    return forward, max(forward, kept + query_bytes + 2 * key_bytes + every)


def _peaks(
    shape: Shape, pieces: _Pieces, query_bytes: int, key_bytes: int, *, padded: int, held: int = 0
) -> tuple[int, int]:
    """query_bytes, key_bytes: of the tensors that the pieces read, whole blocks long. padded: bytes
    of those that are copies."""
    held += padded + query_bytes  # the output is as long as the queries
    running = max(pieces.drawing_bytes, pieces.cap_bytes + _memory(pieces, shape, backward=False))
    gradients = (
        query_bytes + 2 * key_bytes + (query_bytes if padded else 0)
    )  # the output's, with the rows that were cut off
    returning = max(pieces.drawing_bytes, pieces.cap_bytes + _memory(pieces, shape, backward=True))
    return held + running, max(held + running, held + gradients + returning)


def _memory(pieces: _Pieces, shape: Shape, *, backward: bool) -> int:
    """Most bytes of `tiles.Memory` at any moment."""
    sizes: dict[str, int] = {}
    most = 0
    for one in pieces.shapes:
        parts, rows, keys = one
        scores, gradient = parts * rows * keys, parts * keys * shape.head_dim
        fetched = gradient if one in pieces.fetched else 0
        wanted = [
            ("slopes", scores),
            ("fetched", fetched),
            ("scores", scores),
            ("gradient", gradient),
        ]
        wanted = wanted if backward else wanted[1:3]
        for name, numbers in wanted:
            if numbers > sizes.get(name, 0):
                most = max(most, sum(sizes.values()) + numbers)
                sizes[name] = numbers
    return max(most, sum(sizes.values())) * shape.dtype.itemsize


def _split(count: int, together: int) -> list[int]:
    return [min(together, count - start) for start in range(0, count, together)]
