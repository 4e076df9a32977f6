"""The Triton kernels of `conv.py`: the causal depthwise convolution, with silu or without, forward and backward.

In: pointers and strides as `conv.py` lays them out; out: written where they point. A program walks along time in LANES
segments side by side, each with the last K - 1 inputs (and gradients) of its channels in registers, so that every
input is read once and converted once. Strides of a token are constants: rows of one step then share an address.

Letters: B batch, T time, C channels, K taps, J = K - 1 earlier inputs.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST:  # Half the instructions of tl.sigmoid, which divides and keeps numbers below 2**-126.
        return tl.inline_asm_elementwise(
            "{.reg .f32 e; mul.ftz.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.ftz.f32 e, e, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, e;}", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        return tl.sigmoid(x)


@triton.jit
def _taps(weight_ptr, bias_ptr, channel, inside, K: tl.constexpr):
    """(Weights from the oldest input's to the newest's, the bias), float32."""
    taps = ()
    for k in tl.static_range(K):
        taps += (tl.load(weight_ptr + channel * K + k, mask=inside, other=0.0).to(tl.float32)[None, :],)
    bias = tl.zeros([1, channel.shape[0]], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    return taps, bias


@triton.jit
def _before(x_rows, stride, state_rows, state_j, begin, limit, inside, J: tl.constexpr):
    """The J inputs before each segment, of the row or of the state."""
    window = ()
    for j in tl.static_range(J):
        time = begin + (j - J)
        mask = ((time >= 0) & (time < limit))[:, None] & inside[None, :]
        x = tl.load(x_rows + (j - J) * stride, mask=mask, other=0.0).to(tl.float32)
        if state_rows is not None:
            mask = ((time < 0) & (limit > 0))[:, None] & inside[None, :]
            # A segment never begins at 1 to J - 1: it is at the row's first input or beyond the state's reach.
            x += tl.load(state_rows + j * state_j, mask=mask, other=0.0).to(tl.float32)
        window += (x,)
    return window


@triton.jit
def _read(rows, stride, time, limit, inside, ROWS: tl.constexpr):
    window = ()
    for r in tl.static_range(ROWS):
        mask = (time + r < limit)[:, None] & inside[None, :]
        window += (tl.load(rows + r * stride, mask=mask, other=0.0),)
    return window


@triton.jit
def _documents(row, time, T, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Documents of ROWS tokens from time + FIRST on; the first token's before it, the last one's after it."""
    window = ()
    if row is not None:
        for r in tl.static_range(ROWS):
            window += (tl.load(row + tl.minimum(tl.maximum(time + (FIRST + r), 0), T - 1)),)
    return window


@triton.jit
def _seen(window, documents, r: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, K: tl.constexpr):
    """K rows of the window from r on, zeros where they are of another document than one of them: the newest
    (NEAR) sees inputs, the oldest (FAR) sees gradients."""
    found = ()
    for k in tl.static_range(K):
        x = window[r + k].to(tl.float32)
        if len(documents) > 0:
            if NEAR and k < K - 1:
                x = tl.where((documents[r + k] == documents[r + K - 1])[:, None], x, 0.0)
            if FAR and k > 0:
                x = tl.where((documents[r + k] == documents[r])[:, None], x, 0.0)
        found += (x,)
    return found


@triton.jit
def conv_forward(
    x_ptr, weight_ptr, bias_ptr, document_ptr, state_ptr, y_ptr, B, T, length, segments,
    x_b, y_b, state_b, state_c, state_j, x_t: tl.constexpr, y_t: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, FAST: tl.constexpr, AHEAD: tl.constexpr,
):
    J: tl.constexpr = K - 1
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    batch = (lane // segments).to(tl.int64)
    time = lane % segments * length
    limit = tl.where(batch < B, T, 0)
    x_rows = x_ptr + (batch * x_b + time.to(tl.int64) * x_t)[:, None] + channel[None, :]
    y_rows = y_ptr + (batch * y_b + time.to(tl.int64) * y_t)[:, None] + channel[None, :]
    document_row = None
    if document_ptr is not None:
        document_row = document_ptr + tl.minimum(batch, B - 1) * T
    state_rows = None
    if state_ptr is not None:
        state_rows = state_ptr + (batch * state_b)[:, None] + channel.to(tl.int64)[None, :] * state_c
    taps, bias = _taps(weight_ptr, bias_ptr, channel, inside, K)
    past = _before(x_rows, x_t, state_rows, state_j, time, limit, inside, J)
    documents = _documents(document_row, time, T, -J, J)
    rows = _read(x_rows, x_t, time, limit, inside, ROWS)
    for _ in range(0, length, ROWS):
        if AHEAD:
            next_rows = _read(x_rows + ROWS * x_t, x_t, time + ROWS, limit, inside, ROWS)
        else:
            rows = _read(x_rows, x_t, time, limit, inside, ROWS)
        marks = documents + _documents(document_row, time, T, 0, ROWS)
        for r in tl.static_range(ROWS):
            past += (rows[r].to(tl.float32),)
        for r in tl.static_range(ROWS):
            seen = _seen(past, marks, r, True, False, K)
            pre = bias
            for k in tl.static_range(K):
                pre += taps[k] * seen[k]
            y = pre * _sigmoid(pre, FAST) if SILU else pre
            mask = (time + r < limit)[:, None] & inside[None, :]
            tl.store(y_rows + r * y_t, y.to(y_ptr.dtype.element_ty), mask=mask)
        past = past[ROWS:]
        documents = marks[ROWS:] if document_ptr is not None else documents
        x_rows += ROWS * x_t
        y_rows += ROWS * y_t
        time += ROWS
        if AHEAD:
            rows = next_rows


@triton.jit
def _gradient(dy, seen, taps, bias, K: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr):
    """dy, times silu' of the sum over taps, which is computed again."""
    dy = dy.to(tl.float32)
    if SILU:
        pre = bias
        for k in tl.static_range(K):
            pre += taps[k] * seen[k]
        sigmoid = _sigmoid(pre, FAST)
        silu = pre * sigmoid
        dy *= sigmoid + silu * (1.0 - sigmoid)
    return dy


@triton.jit
def _input_gradient(window, documents, taps, r: tl.constexpr, K: tl.constexpr):
    """Of the oldest of K rows, from the gradients of them all."""
    seen = _seen(window, documents, r, False, True, K)
    dx = taps[K - 1] * seen[0]
    for k in tl.static_range(1, K):
        dx += taps[K - 1 - k] * seen[k]
    return dx


@triton.jit
def _write(rows, dx, time, begin, limit, inside, state_rows, state_j, J: tl.constexpr):
    """dx is of the input J before `time`: of this segment or, at the row's beginning, of the state."""
    mask = ((time - J >= begin) & (time - J < limit))[:, None] & inside[None, :]
    tl.store(rows, dx.to(rows.dtype.element_ty), mask=mask)
    if state_rows is not None:
        mask = ((time < J) & (begin == 0) & (limit > 0))[:, None] & inside[None, :]
        at = state_rows + time[:, None].to(tl.int64) * state_j
        tl.store(at, dx.to(state_rows.dtype.element_ty), mask=mask)


@triton.jit
def conv_backward(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, document_ptr, state_ptr, dx_ptr, dstate_ptr, partial_ptr,
    B, T, length, segments, dy_b, x_b, dx_b, state_b, state_c, state_j, dstate_b, dstate_c, dstate_j,
    dy_t: tl.constexpr, x_t: tl.constexpr, dx_t: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, FAST: tl.constexpr, AHEAD: tl.constexpr,
):
    J: tl.constexpr = K - 1
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    batch = (lane // segments).to(tl.int64)
    begin = lane % segments * length
    time = begin
    limit = tl.where(batch < B, T, 0)
    x_rows = x_ptr + (batch * x_b + time.to(tl.int64) * x_t)[:, None] + channel[None, :]
    dy_rows = dy_ptr + (batch * dy_b + time.to(tl.int64) * dy_t)[:, None] + channel[None, :]
    dx_rows = dx_ptr + (batch * dx_b + (time - J).to(tl.int64) * dx_t)[:, None] + channel[None, :]
    document_row = None
    if document_ptr is not None:
        document_row = document_ptr + tl.minimum(batch, B - 1) * T
    state_rows, dstate_rows = None, None
    if state_ptr is not None:
        state_rows = state_ptr + (batch * state_b)[:, None] + channel.to(tl.int64)[None, :] * state_c
        dstate_rows = dstate_ptr + (batch * dstate_b)[:, None] + channel.to(tl.int64)[None, :] * dstate_c
    taps, bias = _taps(weight_ptr, bias_ptr, channel, inside, K)
    zero = tl.zeros([LANES, BLOCK], tl.float32)
    past = _before(x_rows, x_t, state_rows, state_j, time, limit, inside, J)
    gradients, dtaps, dbias = (zero,) * J, (zero,) * K, zero
    documents = _documents(document_row, time, T, -J, J)
    rows = _read(x_rows, x_t, time, limit, inside, ROWS)
    drows = _read(dy_rows, dy_t, time, limit, inside, ROWS)
    for _ in range(0, length, ROWS):
        if AHEAD:
            next_rows = _read(x_rows + ROWS * x_t, x_t, time + ROWS, limit, inside, ROWS)
            next_drows = _read(dy_rows + ROWS * dy_t, dy_t, time + ROWS, limit, inside, ROWS)
        else:
            rows = _read(x_rows, x_t, time, limit, inside, ROWS)
            drows = _read(dy_rows, dy_t, time, limit, inside, ROWS)
        marks = documents + _documents(document_row, time, T, 0, ROWS)
        for r in tl.static_range(ROWS):
            past += (rows[r].to(tl.float32),)
        for r in tl.static_range(ROWS):
            seen = _seen(past, marks, r, True, False, K)
            g = _gradient(drows[r], seen, taps, bias, K, SILU, FAST)
            added = ()
            for k in tl.static_range(K):
                added += (dtaps[k] + g * seen[k],)
            dtaps = added
            dbias += g
            gradients += (g,)
            dx = _input_gradient(gradients, marks, taps, r, K)
            _write(dx_rows + r * dx_t, dx, time + r, begin, limit, inside, dstate_rows, dstate_j, J)
        past = past[ROWS:]
        gradients = gradients[ROWS:]
        documents = marks[ROWS:] if document_ptr is not None else documents
        x_rows += ROWS * x_t
        dy_rows += ROWS * dy_t
        dx_rows += ROWS * dx_t
        time += ROWS
        if AHEAD:
            rows, drows = next_rows, next_drows
    # The segment's last inputs also reach into the next segment, whose own program counts the taps' gradients.
    rows = _read(x_rows, x_t, time, limit, inside, J)
    drows = _read(dy_rows, dy_t, time, limit, inside, J)
    marks = documents + _documents(document_row, time, T, 0, J)
    for r in tl.static_range(J):
        past += (rows[r].to(tl.float32),)
    for r in tl.static_range(J):
        seen = _seen(past, marks, r, True, False, K)
        gradients += (_gradient(drows[r], seen, taps, bias, K, SILU, FAST),)
        dx = _input_gradient(gradients, marks, taps, r, K)
        _write(dx_rows + r * dx_t, dx, time + r, begin, limit, inside, None, 0, J)
    partial_ptr += tl.program_id(1).to(tl.int64) * C * (K + 1 if bias_ptr is not None else K)
    for k in tl.static_range(K):
        tl.store(partial_ptr + channel * K + k, tl.sum(dtaps[k], 0), mask=inside)
    if bias_ptr is not None:
        tl.store(partial_ptr + C * K + channel, tl.sum(dbias, 0), mask=inside)
