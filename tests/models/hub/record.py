"""Records what transformers computes on tiny random checkpoints: tests/golden/hf/<case>/.

    python -m venv hf && hf/bin/pip install torch transformers
    hf/bin/python tests/models/hub/record.py [case ...]

A case is a checkpoint (config.json, model.safetensors) and io.npz; "words" and "images" are
a tokenizer and image processors. Language models: padded prompts, the logits at their
tokens, 64 greedy tokens of every prompt alone and the distance of the best two logits at each. Towers: images and rows.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as hf

OUT = Path(__file__).parents[2] / "golden" / "hf"
STEPS = 64

TEXT = dict(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=40, max_position_embeddings=256, bos_token_id=1, eos_token_id=None,
            pad_token_id=None)  # fmt: skip
TOWER = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=12, patch_size=4)
DINO = {k: v for k, v in TOWER.items() if k != "intermediate_size"} | dict(mlp_ratio=2)


def rope(kind, **fields):
    return dict(rope_type=kind, rope_theta=10000.0, **fields)


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LONG = rope("longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 3.0, 9.0])
GEMMA = dict(head_dim=8, query_pre_attn_scalar=10, sliding_window=5, tie_word_embeddings=True)


def kinds(letters):
    return [{"s": "sliding_attention", "f": "full_attention"}[x] for x in letters]


TEXT_CASES = {
    "llama": (hf.LlamaConfig, dict(rms_norm_eps=1e-5)),
    "llama_bias": (hf.LlamaConfig, dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=4)),
    "llama_linear": (hf.LlamaConfig, dict(rope_parameters=rope("linear", factor=2.5), num_key_value_heads=1)),
    "llama_dynamic": (hf.LlamaConfig, dict(rope_parameters=rope("dynamic", factor=2.0), max_position_embeddings=20)),
    "llama_llama3": (hf.LlamaConfig, dict(rope_parameters=rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),
    "llama_yarn": (hf.LlamaConfig, dict(rope_parameters=YARN, head_dim=10)),
    "mistral": (hf.MistralConfig, dict(sliding_window=7, num_attention_heads=6, head_dim=6)),
    "qwen2": (hf.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2_window": (hf.Qwen2Config, dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "qwen3": (hf.Qwen3Config, dict(head_dim=16, tie_word_embeddings=True)),
    "phi3": (hf.Phi3Config, dict(sliding_window=9, rope_parameters=rope("default", partial_rotary_factor=0.5),
                                 num_attention_heads=3, num_key_value_heads=1)),
    "phi3_longrope": (hf.Phi3Config, dict(rope_parameters=LONG, original_max_position_embeddings=16)),
    "phi3_crossing": (hf.Phi3Config, dict(rope_parameters=LONG, original_max_position_embeddings=32)),
    "qwen2_mixed": (hf.Qwen2Config, dict(use_sliding_window=True, sliding_window=6, max_window_layers=2, num_hidden_layers=3)),
    "gemma2": (hf.Gemma2Config, dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)),
    "gemma2_plain": (hf.Gemma2Config, dict(GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None,
                                           num_hidden_layers=3, head_dim=6, query_pre_attn_scalar=6, num_key_value_heads=4,
                                           layer_types=kinds("fss"))),
    "gemma3_text": (hf.Gemma3TextConfig, dict(GEMMA, num_hidden_layers=4, sliding_window_pattern=3)),
    "gemma3_text_linear": (hf.Gemma3TextConfig, dict(
        GEMMA, num_key_value_heads=1, layer_types=kinds("sf"), head_dim=12, rope_parameters={
            "full_attention": rope("linear", factor=8.0) | dict(rope_theta=1e6),
            "sliding_attention": rope("default")})),
    "qwen3_bias": (hf.Qwen3Config, dict(head_dim=8, attention_bias=True, rope_parameters=YARN)),
}  # fmt: skip
TOWER_CASES = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, TOWER | dict(num_labels=5)),
    "vit_wide": (hf.ViTModel, hf.ViTConfig, TOWER | dict(image_size=[8, 16], qkv_bias=False, num_channels=1)),
    "deit": (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig, TOWER | dict(num_labels=5)),
    "deit_student": (hf.DeiTForImageClassification, hf.DeiTConfig, TOWER | dict(num_labels=3)),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig, TOWER | dict(image_size=14)),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, TOWER | dict(image_size=15)),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config, DINO | dict(num_labels=5)),
    "dinov2_swiglu": (hf.Dinov2Model, hf.Dinov2Config, DINO | dict(use_swiglu_ffn=True, mlp_ratio=4, num_attention_heads=4)),
    "dinov2_registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, DINO | dict(num_register_tokens=3)),
}
RESIZED = {"vit": (20, 16), "deit": (8, 20), "clip": (8, 24), "siglip": (22, 9), "dinov2": (8, 20),
           "dinov2_registers": (8, 20)}  # (height, width)
LLAVA_CASES = {
    "llava": (hf.CLIPVisionConfig, hf.LlamaConfig, dict(vision_feature_layer=-2)),
    "llava_siglip": (hf.SiglipVisionConfig, hf.Qwen2Config,
                     dict(vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True)),
}  # fmt: skip
IMAGE_TOKEN = 60
QWEN_TOWER = dict(depth=3, hidden_size=16, intermediate_size=20, num_heads=2, patch_size=4, out_hidden_size=24, window_size=16,
                  fullatt_block_indexes=[1])  # fmt: skip
# name: tower's fields, language model's, rope, other fields; pictures of each prompt as (height, width)
QWEN_CASES = {
    "qwen2_5_vl": (QWEN_TOWER, {}, dict(rope_theta=1e4, mrope_section=[1, 1, 1]), {}, [[(40, 21)], [(26, 50), (17, 18)]]),
    "qwen2_5_vl_tied": (QWEN_TOWER | dict(depth=2, num_heads=4, window_size=8, fullatt_block_indexes=[0],
                                          temporal_patch_size=1),
                        dict(num_attention_heads=2, num_key_value_heads=1),
                        dict(rope_theta=1e6, mrope_section=[2, 3, 1]), dict(tie_word_embeddings=True),
                        [[(11, 63)], [(33, 33)]]),
}  # fmt: skip
# name: tower, its fields, language model, other fields; pictures of each prompt as (height, width)
NEXT_CASES = {
    "llava_next": (hf.CLIPVisionConfig, dict(image_size=8), hf.LlamaConfig,
                   dict(image_grid_pinpoints=[[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]),
                   [[(19, 11)], [(30, 31), (5, 17)]]),
    "llava_next_siglip": (hf.SiglipVisionConfig, dict(image_size=12), hf.MistralConfig,
                          dict(image_grid_pinpoints=[[24, 24], [12, 36]], vision_feature_layer=-1,
                               vision_feature_select_strategy="full"),
                          [[(40, 13)], [(9, 50)]]),
}  # fmt: skip


def randomise(model, seed):
    """Weights large enough that logits differ; norms and scales around one, biases and positions not zero."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    embed = 0.25 if tied else 0.8  # else a tied head repeats the token that it reads
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 and name.endswith("weight") or "lambda" in name:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise * (0.3 if p.ndim <= 1 else embed if "embed" in name else 1.6 * p.shape[-1] ** -0.5))
    return model.eval()


@torch.no_grad()
def greedy(make, steps, **inputs):
    """(tokens [steps], best minus second logit [steps]) of a fresh model on one prompt."""
    out = make().generate(**inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)
    top = torch.stack(out.logits)[:, 0].topk(2).values
    return out.sequences[0, inputs["input_ids"].shape[1] :].numpy(), (top[:, 0] - top[:, 1]).numpy()


def telling(runs):
    """No near ties, and texts that do not get stuck."""
    return min(gap.min() for _, gap in runs) > 1e-3 and min(len(set(tokens.tolist())) for tokens, _ in runs) >= 8


@torch.no_grad()
def text_case(name):
    kind, fields = TEXT_CASES[name]
    config = kind(**{**TEXT, **fields})
    # Frequencies that depend on the length are those of the longest row of a batch.
    lengths = np.array([23, 23, 23] if "dynamic" in name or "long" in name else [13, 13] if "crossing" in name else [13, 9, 1])
    tokens = np.random.default_rng(0).integers(3, 60, (len(lengths), lengths.max()))
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    for seed in range(50):

        def make(seed=seed):
            torch.manual_seed(0)
            return randomise(hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed)

        runs = [greedy(make, STEPS, input_ids=torch.tensor(t[None, :n]), attention_mask=torch.ones(1, n, dtype=torch.long))
                for t, n in zip(tokens, lengths, strict=True)]  # fmt: skip
        if telling(runs):
            break
    model = make()
    logits = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.numpy()
    model.save_pretrained(OUT / name)
    return dict(tokens=tokens.astype(np.int32), lengths=lengths, logits=logits * mask[..., None],
                greedy=np.stack([t for t, _ in runs]).astype(np.int32), gap=np.stack([g for _, g in runs]))  # fmt: skip


@torch.no_grad()
def tower_case(name):
    kind, config_kind, fields = TOWER_CASES[name]
    config = config_kind(**fields)
    model = randomise(kind._from_config(config, attn_implementation="eager"), 0)
    model.save_pretrained(OUT / name)
    size = fields["image_size"] if isinstance(fields["image_size"], list) else [fields["image_size"]] * 2
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, config.num_channels, *size)).astype(np.float32)
    out = model(pixel_values=torch.tensor(image), output_hidden_states=True)
    rows = [x.numpy() for x in out.hidden_states]
    found = dict(image=image.transpose(0, 2, 3, 1), penultimate=rows[-2], last=rows[-1])
    for key in ("logits", "pooler_output", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            found[key] = getattr(out, key).numpy()
    if name in RESIZED:
        wide = rng.normal(size=(1, config.num_channels, *RESIZED[name])).astype(np.float32)
        more = {} if name.startswith("dinov2") else dict(interpolate_pos_encoding=True)
        out = model(pixel_values=torch.tensor(wide), output_hidden_states=True, **more)
        found |= dict(wide_image=wide.transpose(0, 2, 3, 1), wide_last=out.hidden_states[-1].numpy())
    return found


@torch.no_grad()
def llava_case(name):
    tower, text, fields = LLAVA_CASES[name]
    tie = fields.get("tie_word_embeddings", False)
    config = hf.LlavaConfig(vision_config=tower(**TOWER), text_config=text(**TEXT | dict(tie_word_embeddings=tie)),
                            image_token_index=IMAGE_TOKEN, image_seq_length=9, **fields)  # fmt: skip
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    prompts = [[*rng.integers(3, 60, a), *[IMAGE_TOKEN] * 9, *rng.integers(3, 60, b)] for a, b in ((4, 6), (1, 3))]
    lengths = np.array([len(p) for p in prompts])
    tokens = np.array([p + [0] * (max(lengths) - len(p)) for p in prompts])
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    for seed in range(50):

        def make(seed=seed):
            return randomise(hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager"), seed)

        runs = [greedy(make, STEPS, input_ids=torch.tensor(t[None, :n]), pixel_values=torch.tensor(x[None]),
                       attention_mask=torch.ones(1, n, dtype=torch.long))
                for t, n, x in zip(tokens, lengths, image, strict=True)]  # fmt: skip
        if telling(runs):
            break
    model = make()
    out = model(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(image), attention_mask=torch.tensor(mask).long())
    model.save_pretrained(OUT / name)
    text_rows = mask & (tokens != IMAGE_TOKEN)
    row = lambda i, n: [*tokens[i][: lengths[i]], *rng.integers(3, 60, n)]  # noqa: E731
    both = np.array([row(0, 1) + row(1, 2)])  # two pictures in one prompt
    pair = model(input_ids=torch.tensor(both), pixel_values=torch.tensor(image)).logits[0].numpy()
    return dict(
        pair=both.astype(np.int32), pair_logits=pair[both[0] != IMAGE_TOKEN], tokens=tokens.astype(np.int32), lengths=lengths,
        image=image.transpose(0, 2, 3, 1), logits=out.logits.numpy() * text_rows[..., None],
        greedy=np.stack([t for t, _ in runs]).astype(np.int32), gap=np.stack([g for _, g in runs]),
    )  # fmt: skip


@torch.no_grad()
def next_case(name):
    """Pictures of several shapes, two of them in one prompt, and a padded batch."""
    tower, more, text, fields, sizes = NEXT_CASES[name]
    config = hf.LlavaNextConfig(vision_config=tower(**TOWER | more), text_config=text(**TEXT), image_token_index=IMAGE_TOKEN,
                                **fields)  # fmt: skip
    side, rng = more["image_size"], np.random.default_rng(0)
    processor = hf.LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                              image_grid_pinpoints=config.image_grid_pinpoints)  # fmt: skip
    pictures = [[rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in row] for row in sizes]
    inputs = [processor(images=row, return_tensors="pt", input_data_format="channels_last") for row in pictures]

    def make(seed):
        return randomise(hf.LlavaNextForConditionalGeneration._from_config(config, attn_implementation="eager"), seed)

    counts = [[len(f) for f in make(0).get_image_features(x.pixel_values, x.image_sizes).pooler_output] for x in inputs]
    prompts = []
    for row in counts:
        prompt = list(rng.integers(3, 60, 3))
        for count in row:
            prompt += [IMAGE_TOKEN] * count + list(rng.integers(3, 60, 2 + len(row)))
        prompts.append(prompt)
    lengths = np.array([len(p) for p in prompts])
    tokens = np.array([p + [0] * (max(lengths) - len(p)) for p in prompts])
    for seed in range(50):
        runs = [greedy(functools.partial(make, seed), STEPS, input_ids=torch.tensor(t[None, :n]),
                       attention_mask=torch.ones(1, n, dtype=torch.long), **x)
                for t, n, x in zip(tokens, lengths, inputs, strict=True)]  # fmt: skip
        if telling(runs):
            break
    model = make(seed)
    logits = [model(input_ids=torch.tensor(t[None, :n]), **x).logits[0].numpy()
              for t, n, x in zip(tokens, lengths, inputs, strict=True)]  # fmt: skip
    model.save_pretrained(OUT / name)
    processor.save_pretrained(OUT / name)
    found = dict(tokens=tokens.astype(np.int32), lengths=lengths, greedy=np.stack([t for t, _ in runs]).astype(np.int32),
                 gap=np.stack([g for _, g in runs]))  # fmt: skip
    for i, (row, x, logit, t) in enumerate(zip(pictures, inputs, logits, tokens, strict=True)):
        found[f"logits.{i}"] = logit[t[: len(logit)] != IMAGE_TOKEN]
        for j, picture in enumerate(row):
            found[f"picture.{i}.{j}"] = picture
            found[f"pixels.{i}.{j}"] = x.pixel_values[j].numpy().transpose(0, 2, 3, 1)
    return found

ENCODER = dict(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
               max_position_embeddings=20)  # fmt: skip
ENCODER_CASES = {
    "bert": (hf.BertModel, hf.BertConfig, ENCODER),
    "bert_masked": (hf.BertForMaskedLM, hf.BertConfig, ENCODER | dict(hidden_act="gelu_new", type_vocab_size=1)),
    "clip_text_model": (hf.CLIPTextModelWithProjection, hf.CLIPTextConfig, ENCODER | dict(projection_dim=16, eos_token_id=2)),
    "siglip_text_model": (hf.SiglipTextModel, hf.SiglipTextConfig, ENCODER | dict(projection_size=10)),
}
DUAL_CASES = {"clip_dual": (hf.CLIPModel, hf.CLIPConfig, dict(projection_dim=16)),
              "siglip_dual": (hf.SiglipModel, hf.SiglipConfig, {})}  # fmt: skip


@torch.no_grad()
def encoder_case(name):
    """Rows and pooled rows of texts with padding behind them, in front of them, and none."""
    kind, config_kind, fields = ENCODER_CASES[name]
    config = config_kind(**fields)
    model = randomise(kind._from_config(config, attn_implementation="eager"), 0)
    model.save_pretrained(OUT / name)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, (3, 11))
    valid = np.ones(tokens.shape, bool)
    valid[0, 7:] = valid[1, :4] = False
    if name.startswith("siglip"):  # reads its padding
        valid[:] = True
    if name.startswith("clip"):  # texts end at the largest id
        tokens[np.arange(3), [6, 10, 8]] = 60
    found = dict(tokens=tokens.astype(np.int32), valid=valid)
    more = {}
    if name.startswith("bert"):
        found["types"] = rng.integers(0, config.type_vocab_size, tokens.shape).astype(np.int32)
        more = dict(token_type_ids=torch.tensor(found["types"]).long())
    out = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid).long(), output_hidden_states=True, **more)
    rows = out.hidden_states[-1] if name == "bert_masked" else out.last_hidden_state
    found |= dict(rows=rows.numpy() * valid[..., None])
    for key in ("pooler_output", "text_embeds"):
        if getattr(out, key, None) is not None:
            found["pooled"] = getattr(out, key).numpy()
    return found


@torch.no_grad()
def dual_case(name):
    """Features and logits of pictures and texts."""
    kind, config_kind, fields = DUAL_CASES[name]
    text = ENCODER | dict(eos_token_id=5)
    config = config_kind(text_config=text, vision_config=TOWER, **fields)
    model = randomise(kind._from_config(config, attn_implementation="eager"), 0)
    for p, value in ((model.logit_scale, 1.2), (getattr(model, "logit_bias", None), -0.7)):
        if p is not None:
            p.fill_(value)
    model.save_pretrained(OUT / name)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    tokens = rng.integers(6, 60, (3, 9))
    tokens[0, 4:] = tokens[1, 8:] = tokens[2, 6:] = 5
    out = model(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(image))
    image_features = model.get_image_features(torch.tensor(image)).pooler_output
    text_features = model.get_text_features(torch.tensor(tokens)).pooler_output
    return dict(image=image.transpose(0, 2, 3, 1), tokens=tokens.astype(np.int32), logits=out.logits_per_image.numpy(),
                image_features=image_features.numpy(), text_features=text_features.numpy())  # fmt: skip



@torch.no_grad()
def qwen_case(name):
    """Pictures of any size, two of them in one prompt."""
    tower, text, rope, fields, sizes = QWEN_CASES[name]
    text = TEXT | text | dict(rope_parameters=dict(rope_type="default", **rope))
    config = hf.Qwen2_5_VLConfig(vision_config=tower, text_config=text,
                                 image_token_id=IMAGE_TOKEN, video_token_id=0, vision_start_token_id=1, vision_end_token_id=2,
                                 **fields)  # fmt: skip
    config.text_config.tie_word_embeddings = fields.get("tie_word_embeddings", False)
    frames, rng = config.vision_config.temporal_patch_size, np.random.default_rng(0)
    processor = hf.Qwen2VLImageProcessorPil(size=dict(shortest_edge=500, longest_edge=1500), patch_size=4, merge_size=2,
                                            temporal_patch_size=frames)  # fmt: skip
    pictures = [[rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in row] for row in sizes]
    inputs = [processor(images=row, return_tensors="pt", input_data_format="channels_last") for row in pictures]
    prompts = []
    for x in inputs:
        prompt = list(rng.integers(3, 60, 3))
        for grid in x.image_grid_thw:
            prompt += [1] + [IMAGE_TOKEN] * (int(grid.prod()) // 4) + [2, *rng.integers(3, 60, 2)]
        prompts.append(prompt)
    lengths = np.array([len(p) for p in prompts])
    tokens = np.array([p + [0] * (max(lengths) - len(p)) for p in prompts])

    def make(seed):
        return randomise(hf.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager"), seed)

    def given(t, n, x):
        t = torch.tensor(t[None, :n])
        return dict(input_ids=t, attention_mask=torch.ones_like(t), mm_token_type_ids=(t == IMAGE_TOKEN).int(), **x)

    calls = [given(t, n, x) for t, n, x in zip(tokens, lengths, inputs, strict=True)]
    for seed in range(50):
        runs = [greedy(functools.partial(make, seed), STEPS, **call) for call in calls]
        if telling(runs):
            break
    model = make(seed)
    model.save_pretrained(OUT / name)
    processor.save_pretrained(OUT / name)
    found = dict(tokens=tokens.astype(np.int32), lengths=lengths, greedy=np.stack([t for t, _ in runs]).astype(np.int32),
                 gap=np.stack([g for _, g in runs]))  # fmt: skip
    for i, (row, x, call, t) in enumerate(zip(pictures, inputs, calls, tokens, strict=True)):
        logit = model(**call).logits[0].numpy()
        found[f"logits.{i}"] = logit[t[: len(logit)] != IMAGE_TOKEN]
        ends = np.cumsum(x.image_grid_thw.prod(-1).numpy())
        for j, (picture, pixels) in enumerate(zip(row, np.split(x.pixel_values.numpy(), ends[:-1]), strict=True)):
            found[f"picture.{i}.{j}"] = picture
            still = pixels.reshape(len(pixels), 3, frames, 4, 4)[:, :, 0]
            found[f"pixels.{i}.{j}"] = still.transpose(0, 2, 3, 1).reshape(1, -1, 48)
    return found


TEMPLATE = """{%- if tools %}
Tools: {{ tools | tojson }}
{% endif %}
{%- for message in messages %}
    {%- if message.role == "system" and not loop.first %}
        {{- raise_exception("the system speaks first") }}
    {%- endif %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
{{ "<|start|>" + message["role"] }}
{% if message.role == "assistant" %}{% generation %}{{ message["content"] | trim }}{% endgeneration %}{% else %}
{{ message["content"] | trim }}{% endif %}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% endif %}"""
CHATS = [
    dict(messages=[dict(role="user", content=" Was ist das? <b> 'é' ")], add_generation_prompt=True),
    dict(messages=[dict(role="system", content="Be brief."), dict(role="user", content="Hi"), dict(role="skip", content="x"),
                   dict(role="assistant", content="Hello!\n")], add_generation_prompt=False),
    dict(messages=[dict(role="user", content="Use it")], tools=[dict(name="größe", arguments=dict(x=1))],
         add_generation_prompt=True),
]  # fmt: skip
TEXTS = ["The quick brown fox jumps over the lazy dog.", "  two  spaces\nand a line ", "naïve façade – 你好 🙂"]


def words_case(name):
    """A tokenizer trained here, with a chat template."""
    import tokenizers as tk

    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<|start|>"], show_progress=False,
                                     initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = tk.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(OUT / name)
    ids = [fast(text).input_ids for text in TEXTS]
    found = dict(
        texts=TEXTS, ids=ids,
        decoded=[fast.decode(i, skip_special_tokens=True, clean_up_tokenization_spaces=False) for i in ids],
        chats=CHATS, rendered=[fast.apply_chat_template(c["messages"], tools=c.get("tools"), tokenize=False,
                                                        add_generation_prompt=c["add_generation_prompt"]) for c in CHATS],
    )  # fmt: skip
    (OUT / name / "expected.json").write_text(json.dumps(found, indent=1))
    return {}


PROCESSORS = {
    "clip": (hf.CLIPImageProcessorPil, dict(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})),
    "siglip": (hf.SiglipImageProcessorPil, dict(size={"height": 14, "width": 18})),
    "vit": (hf.ViTImageProcessorPil, dict(size={"height": 16, "width": 16}, do_rescale=True)),
}


def images_case(name):
    """What image processors make of a wide, a tall, a grey and a transparent picture."""
    from PIL import Image

    rng, shapes = np.random.default_rng(0), ((33, 41, 3), (47, 29, 3), (21, 38), (44, 25, 4))
    found = {f"image.{i}": rng.integers(0, 256, shape).astype(np.uint8) for i, shape in enumerate(shapes)}
    for kind, (processor, fields) in PROCESSORS.items():
        processor = processor(**fields, do_convert_rgb=True)
        processor.save_pretrained(OUT / name / kind)
        for i in range(len(shapes)):
            x = processor(images=Image.fromarray(found[f"image.{i}"]), return_tensors="np").pixel_values[0]
            found[f"{kind}.{i}"] = np.asarray(x).transpose(1, 2, 0)
    return found


CASES = {
    "words": words_case,
    "images": images_case,
    **dict.fromkeys(TEXT_CASES, text_case),
    **dict.fromkeys(TOWER_CASES, tower_case),
    **dict.fromkeys(ENCODER_CASES, encoder_case),
    **dict.fromkeys(DUAL_CASES, dual_case),
    **dict.fromkeys(LLAVA_CASES, llava_case),
    **dict.fromkeys(NEXT_CASES, next_case),
    **dict.fromkeys(QWEN_CASES, qwen_case),
}


def main(names):
    for name in names or CASES:
        found = CASES[name](name)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
        if found:
            np.savez_compressed(OUT / name / "io.npz", **found)
        size = sum(p.stat().st_size for p in (OUT / name).rglob("*") if p.is_file())
        print(f"{name}: {size / 1e3:.0f} kB", f"smallest gap {found['gap'].min():.4f}" if "gap" in found else "")


if __name__ == "__main__":
    main(sys.argv[1:])
