"""python -m benchmarks.boards.torch_peer DEVICE: times attention in PyTorch, one line of JSON per call, for ``peers``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from benchmarks.boards.peers import BLOCK, block_lists


def prepare(spec: dict, device: str) -> Callable:
    """The call that ``spec`` describes: {"kind", "tokens", "keys", "heads", "head_dim"} and what the kind needs."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n, m, h, d = (spec[x] for x in ("tokens", "keys", "heads", "head_dim"))
    q, k, v = (torch.randn(1, h, x, d, dtype=dtype, device=device) for x in (n, m, m))
    kind = spec["kind"]
    if kind == "sdpa":
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if kind == "simple_gla":
        from fla.ops.simple_gla import chunk_simple_gla

        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        decay = -torch.rand(1, n, h, device=device)
        return lambda: chunk_simple_gla(q, k, v, decay)
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    if kind == "flex window":
        near = spec["window"]
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < near), None, None, n, m, device=device)
    else:
        lists = torch.as_tensor(block_lists(h, n // BLOCK, m // BLOCK, spec["entries"]), device=device)[None]
        lists = torch.nn.functional.pad(lists, (0, m // BLOCK - spec["entries"]))  # a column per block, used or not
        counts = torch.full(lists.shape[:3], spec["entries"], dtype=torch.int32, device=device)
        # All blocks are full ones: no mask is tested inside them.
        none, filler = torch.zeros_like(counts), torch.zeros_like(lists)
        mask = BlockMask.from_kv_blocks(none, filler, counts, lists, BLOCK_SIZE=BLOCK, seq_lengths=(n, m))
    return lambda: flex(q, k, v, block_mask=mask)


def main(device: str) -> None:
    import torch

    known: dict[str, Callable | str] = {}
    for line in sys.stdin:
        if line not in known:
            try:
                with torch.no_grad():
                    known[line] = prepare(json.loads(line), device)
                    known[line]()
            except Exception as error:  # whatever keeps a peer from running is the board's to report
                known[line] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        call = known[line]
        if isinstance(call, str):
            print(json.dumps({"error": call}), flush=True)
            continue
        with torch.no_grad():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
