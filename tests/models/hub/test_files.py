"""Reading and writing checkpoint directories: round trips, meshes, memory, and what is refused before it costs anything."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import hub
from models.hub import files, load
from models.language import llm
from models.vision import vit
from train.sharding import make_mesh

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "hf"
CASES = ("llama_bias", "llama_yarn", "llama_dynamic", "mistral", "qwen2_window", "qwen3_bias", "phi3", "vit_wide",
         "deit", "clip", "siglip", "dinov2", "dinov2_swiglu", "dinov2_registers", "llava",
         "llava_next", "llava_next_siglip", "qwen2_5_vl", "qwen2_5_vl_tied")  # fmt: skip


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((np.asarray(x) == np.asarray(y)).all()), a, b)
    return all(jax.tree.leaves(same))


@pytest.fixture
def copy(tmp_path):
    """A writable copy of a recorded checkpoint."""

    def make(case="llama"):
        folder = tmp_path / case
        shutil.copytree(GOLDEN / case, folder)
        return folder

    return make


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    """Every tensor comes back under its name, bit for bit; the model also without its config.json, and in shards."""
    bound, config = hub.from_pretrained(GOLDEN / case)
    hub.save_pretrained(bound, tmp_path / "a", config)
    before, after = load_file(GOLDEN / case / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == config
    hub.save_pretrained(bound, tmp_path / "b", family=config["model_type"], shard_bytes=20_000)
    index = json.loads((tmp_path / "b" / files.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1 and index["weight_map"].keys() == before.keys()
    again, _ = hub.from_pretrained(tmp_path / "b")
    assert again.program == bound.program
    assert equal(again.params, bound.params)


def test_changed_models_keep_what_is_not_theirs(tmp_path):
    """A wider vocabulary changes its field and nothing else of config.json."""
    bound, config = hub.from_pretrained(GOLDEN / "llama_yarn")
    wide = llm.config(61, 1, 24, 4, kv_heads=2, head_dim=10, hidden=40, tie=False, rope=bound.program.config.block.rope)
    hub.save_pretrained(models.build(wide), tmp_path, config)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_hidden_layers"] == 1 and saved["bos_token_id"] == config["bos_token_id"]
    again, _ = hub.from_pretrained(tmp_path)
    assert again.program.config == wide


def test_models_without_a_family_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config: expected the features of one of llama"):
        hub.save_pretrained(models.build(llm.tiny(qk_norm=True, mlp_bias=True)), tmp_path)
    plain = models.build(llm.tiny())
    hub.save_pretrained(plain, tmp_path)
    assert hub.from_pretrained(tmp_path)[1]["model_type"] == "llama"
    for name in ("qwen3", "vit", "mamba"):
        with pytest.raises(ValueError, match=f"family: .*{name}"):
            hub.save_pretrained(plain, tmp_path, family=name)


def test_dtype_and_mesh():
    """Parameters in another dtype, each device with its slice only: the values of an ordinary load."""
    plain, _ = hub.from_pretrained(GOLDEN / "llava", dtype=jnp.bfloat16)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    cut, _ = hub.from_pretrained(GOLDEN / "llava", dtype=jnp.bfloat16, mesh=mesh)
    assert {x.dtype for x in jax.tree.leaves(cut.params)} == {jnp.dtype(jnp.bfloat16)}
    assert equal(plain.params, cut.params)
    kernel = cut.params["llm"]["layers"]["attn"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    stored = load_file(GOLDEN / "llava" / "model.safetensors")["language_model.model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(kernel[1], jnp.asarray(stored.T, jnp.bfloat16))


def test_towers_run_on_a_mesh():
    """Kept tensors and interpolated positions lie where the other parameters do."""
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    rows = []
    for where in (None, mesh):
        bound, _ = hub.from_pretrained(GOLDEN / "dinov2", mesh=where, image=(8, 12))
        assert "embeddings.mask_token" in bound.params["extra"]
        run = jax.jit(lambda arrays, params, image, program=bound.program: vit.forward(
            models.Bound(program, arrays, params), image).logits)  # fmt: skip
        rows.append(np.asarray(run(bound.arrays, bound.params, np.ones((2, 8, 12, 3), np.float32))))
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-5)


def test_bfloat16_round_trip(tmp_path):
    bound, config = hub.from_pretrained(GOLDEN / "dinov2", dtype="bfloat16")
    hub.save_pretrained(bound, tmp_path, config)
    again, _ = hub.from_pretrained(tmp_path)
    assert equal(again.params, bound.params)


def test_names_of_other_versions(copy):
    """Older and newer spellings of the same tensors, and what a checkpoint carries beside its model."""
    expected, _ = hub.from_pretrained(GOLDEN / "llava")
    folder = copy("llava")
    stored = load_file(folder / "model.safetensors")
    old = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in stored.items()}
    body = {k.replace("language_model.model.", "language_model."): v for k, v in stored.items() if "lm_head" not in k}
    new = {f"model.{k}": v for k, v in body.items()} | {"lm_head.weight": stored["language_model.lm_head.weight"]}
    for renamed in (old, new):
        assert renamed.keys() != stored.keys()
        save_file(renamed, folder / "model.safetensors")
        found, _ = hub.from_pretrained(folder)
        assert equal(found.params, expected.params)
    folder = copy("clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config, "text_config": {}}))
    tower = {f"vision_model.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tower | {"text_model.x": np.zeros(3), "logit_scale": np.zeros(1)}, folder / "model.safetensors")
    found, _ = hub.from_pretrained(folder, part="vision")
    assert equal(found.params, hub.from_pretrained(GOLDEN / "clip")[0].params)


FIELDS = [
    ("llama", dict(model_type="mamba"), r"model_type: expected one of .*'llama'.* got 'mamba'"),
    ("llama", dict(residual_multiplier=2.0, logit_cap=30), r"not supported: logit_cap = 30, residual_multiplier = 2\.0"),
    ("llama", dict(quantization_config={"bits": 4}), r"quantization_config"),
    ("llama", dict(hidden_act="xielu"), r"hidden_act = 'xielu' is not supported"),
    ("llama", dict(rope_parameters=dict(rope_type="spiral", factor=4.0)), r"rope_type = 'spiral' is not supported"),
    ("llama", dict(rope_parameters=dict(rope_type="longrope", factor=4.0)), r"short_factor, long_factor: expected"),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, turns=3)), r"not supported with 'linear': turns = 3"),
    ("llama", dict(hidden_size="wide"), r"hidden_size: expected a positive integer, got 'wide'"),
    ("llama", dict(is_decoder=True), r"is_decoder = True is not supported"),
    ("qwen3", dict(layer_types=["full_attention", "chunked_attention"]), r"layer_types: expected 2 of .*'chunked_attention'"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), r"layer_types: expected a sliding_window"),
    ("dinov2", dict(use_swiglu_ffn=True), r"8 missing: encoder\.layer\.0\.mlp\.weights_in\.bias, "),
    ("vit", dict(patch_size=[4, 2]), r"patch_size"),
    ("llava", dict(vision_feature_select_strategy="full"), r"strategy = 'full' is not supported with clip"),
    ("llava", dict(text_config=dict(model_type="gpt2")), r"text_config: model_type = 'gpt2' is not supported"),
    ("llama", dict(intermediate_size=41, vocab_size=62), r"8 of another shape.*tokens.weight \[61, 24\], expected \[62, 24\]"),
    ("llama", dict(num_hidden_layers=3), r"9 missing: model\.layers\.2\.input_layernorm\.weight, "),
    ("llama", dict(num_hidden_layers=1), r"9 unexpected: model\.layers\.1\.input_layernorm\.weight, "),
]


@pytest.mark.parametrize("case, fields, message", FIELDS)
def test_configs_that_do_not_fit_are_refused(case, fields, message, copy, monkeypatch):
    """Named, and before a single parameter exists."""
    monkeypatch.setattr(load, "_parameter", lambda *args: pytest.fail("allocated"))
    folder = copy(case)
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message):
        hub.from_pretrained(folder)


def test_damaged_directories_are_refused(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_parameter", lambda *args: pytest.fail("allocated"))

    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            hub.from_pretrained(folder)

    refused(tmp_path / "nowhere", "path: expected a local directory")
    folder = copy()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    refused(folder, r"model\.safetensors: truncated: .* ends at byte")
    weights.write_bytes(whole[:100])
    refused(folder, r"model\.safetensors: truncated: a header of")
    weights.write_bytes(whole[:5])
    refused(folder, r"model\.safetensors: truncated")
    weights.write_bytes(struct.pack("<Q", 40) + b"\x80" * 60)
    refused(folder, "not a safetensors file")
    weights.write_bytes(struct.pack("<Q", 2) + b"[]")
    refused(folder, "no table of tensors")
    weights.write_bytes(whole)
    (folder / files.INDEX).write_text("{}")
    refused(folder, "expected a weight_map")
    names = load_file(weights)
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {k: "model-2.safetensors" for k in names}}))
    refused(folder, r"missing \['model-2.safetensors'\]")
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {"other": "model.safetensors"}}))
    refused(folder, r"not in the shard it names: \['other'\]")
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {"other": "../model.safetensors"}}))
    refused(folder, "file names of this directory")
    (folder / files.INDEX).unlink()
    weights.rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    refused(folder, "expected model.safetensors.index.json beside 2 shards")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    refused(folder, r"expected \*\.safetensors in")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, r"\['pytorch_model.bin'\]: pickled weights run code")
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: expected JSON")
    (folder / "config.json").unlink()
    refused(folder, r"path: expected config\.json")


MEASURE = """
import sys, threading, time
import jax, jax.numpy as jnp
from models import hub

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

hub.from_pretrained(sys.argv[2])
before, peak, over = anonymous(), 0, False

def watch():
    global peak
    while not over:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
bound, _ = hub.from_pretrained(sys.argv[1])
over = True
thread.join()
print(sum(x.nbytes for x in jax.tree.leaves(bound.params)), peak - before)
"""


def big_checkpoint(folder: Path, layers: int, dim: int) -> int:
    """A checkpoint of zeros that takes no room on disk; returns the bytes of its largest tensor."""
    c = llm.config(512, layers, dim, 8, hidden=4 * dim, rope=True)
    family = hub.FAMILIES["llama"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.write(c, "llama")))
    shapes = {path: leaf.shape for path, leaf in load.shapes_of(c, family).items()}
    header, offset = {}, 0
    for piece in load.expand(family.table(c), shapes):
        size = 4 * int(np.prod(piece.shape))
        header[piece.name] = {"dtype": "F32", "shape": piece.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return 16 * dim * dim


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_needs_the_model_and_one_tensor(tmp_path):
    """Anonymous memory while loading: the parameters, one layer's tensor and its copy, and some slack."""
    largest = big_checkpoint(tmp_path / "big", 16, 384)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(GOLDEN / "llama")], cwd=ROOT, text=True,
                         capture_output=True, check=True)  # fmt: skip
    parameters, grown = map(int, run.stdout.split())
    assert parameters > 100e6
    # Beside it: arenas of threads, programs. A second copy of the parameters would be 150 MB.
    assert grown <= parameters + 2 * largest + 28e6, (grown, parameters, largest)
