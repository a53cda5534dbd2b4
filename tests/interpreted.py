"""The kernels for a GPU, and a model that was packed for one, step by step on the CPU: `TRITON_INTERPRET=1 python -m tests.interpreted`.

A process of its own, for Triton asks when it is imported. In float16: its interpreter cannot multiply bfloat16. Ends with an error if something
is wrong.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lossless
from lossless.base.linears import PaddedLinear
from lossless.drafting.costs import CostCurve
from lossless.generation import exactness, measure
from lossless.kernels import gpu, graphs
from lossless.streams import graphs as streams_graphs
from lossless.streams.cache import RowCache
from lossless.streams.graphs import GraphedRunner

from .gpu_double import Pieces, noted

PATHS = [[0], [0, 1], [0, 2]]


def tell(what: str, right: bool) -> None:
    if not right:
        raise SystemExit(f"wrong: {what}")
    print(what)


def kernels() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        query, key, value = (torch.randn(1, heads, count, 48, generator=generator).to(dtype) for heads, count in ((6, 3), (2, 150), (2, 150)))
        seen = torch.ones(3, 150, dtype=torch.bool)
        seen[0, 148:] = seen[1, 149] = seen[2, 148] = False
        place = torch.tensor([*range(147), 147, 148, 148])
        for window in (None, 70):
            near = seen if window is None else seen & (place[None] > torch.tensor([147, 148, 148])[:, None] - window)
            expected = scaled_dot_product_attention(query, key, value, attn_mask=near, enable_gqa=True).transpose(1, 2)
            found = gpu.attend_rows(query, key, value, None, PATHS, window)
            tell(f"attention, {dtype}, window {window}", torch.allclose(found, expected, atol=2e-3 if dtype == torch.float16 else 1e-5))
        without = [torch.cat([each[:, :, :148], each[:, :, 149:]], 2) for each in (key, value)]
        alone = gpu.attend_rows(query[:, :, 2:], *without, None, [[0]], 70)
        tell(f"a row has the bits that it has alone, {dtype}", torch.equal(found[:, 2:], alone))
        rows = torch.randn(3, 48, generator=generator).to(dtype)
        sums, normed = gpu.add_and_norm(rows, rows.flip(0), rows[0], 1.0, 1e-6)
        tell(f"a sum and its norm in one, {dtype}", torch.equal(sums, rows + rows.flip(0)) and torch.equal(normed, gpu.norm(sums, rows[0], 1.0, 1e-6)))
        heads, turns = [torch.randn(3, count, 48, generator=generator).to(dtype) for count in (6, 2)], torch.randn(2, 3, 48, generator=generator).to(dtype)
        expected = apply_rotary_pos_emb(*heads, *turns)
        tell(f"rotary embedding has torch's bits, {dtype}", all(map(torch.equal, gpu.turn(*heads, *turns), expected)))
    caches = [RowCache(2, 16), RowCache(2, 16)]
    for cache in caches:
        for layer in cache.rows:
            layer.update(key[:, :, :10].clone(), value[:, :, :10].clone())
        cache.keep(range(4))
    caches[0].keep([0, 2, 3, 5])
    movable, gpu.movable = gpu.movable, lambda key: False
    caches[1].keep([0, 2, 3, 5])
    gpu.movable = movable
    same = all(torch.equal(ours.keys[:, :, :8], theirs.keys[:, :, :8]) for ours, theirs in zip(caches[0].rows, caches[1].rows, strict=True))
    tell("accepted rows move up", same and caches[0].length == 8)


def packed() -> None:
    """All of a pass, streams and levels are captured, and the answers are the packed model's own."""
    graphs.Pieces = streams_graphs.Pieces = Pieces  # type: ignore[misc]
    gpu.attend, gpu.norm, gpu.add_and_norm, gpu.turn = map(noted, (gpu.attend, gpu.norm, gpu.add_and_norm, gpu.turn))
    exactness._SHORT = exactness._LONG = 20  # one text
    streams_graphs._ROWS = 6, 12  # type: ignore[assignment]
    exactness.Passes.each = lambda passes: iter([(1, False), (3, False), (passes.rows, False), (passes.rows, True)])  # type: ignore[method-assign]
    measure.measure = lambda *_: CostCurve(1e-3, (1, 2), (1.1e-3, 1.2e-3), 5e-4, 1e-4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False).half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lossless.pack(model)
    tell("packed", isinstance(model.model.layers[0].mlp.up_proj, PaddedLinear))
    shape = lossless.AdapterConfig(num_streams=2, num_msa_layers=1, lora_rank=4, transition_rank=8)
    fast = lossless.accelerate(model, shape, tree_nodes=5, adaptive=False)
    tell("every row has its bits", fast.guarantee.level == "bitwise")
    ids = torch.randint(0, 97, (1, 9))
    for sampled in (False, True):
        answers = []
        for by in (model, fast):
            torch.manual_seed(1)
            answers.append(by.generate(ids, max_new_tokens=8, do_sample=sampled))
        tell(f"the answers are the model's own, sampled: {sampled}", torch.equal(*answers))
    tell("layers in few kernels have the bits of eager ones", fast.runner._few == {6: True, -1: True, -2: True})
    tell("passes and streams were captured", isinstance(fast.runner, GraphedRunner) and fast.runner.recordable and set(fast.runner._recorded) >= {6, -1})
    lossless.unpack(model)
    tell("unpacked", all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()))


if __name__ == "__main__":
    kernels()
    packed()
