"""Token transforms: which rows of the residual stream go on.

Factories return records for a model's ``reduce`` socket; the functions beside them choose alike on plain arrays.
"""

from jaxattn.tokens.adaptinfer import (
    adaptinfer,
    adaptinfer_counts,
    adaptinfer_layers,
    adaptinfer_scores,
    attention_shift,
    text_prior,
)
from jaxattn.tokens.adatoken_3d import adatoken_3d, adatoken_rates, contribution_curve, information_flow
from jaxattn.tokens.aim import aim, aim_merge, aim_merge_tokens, pagerank_importance
from jaxattn.tokens.as_vit import as_vit, as_vit_scores, layer_flops, policy_attention_reference, straight_through
from jaxattn.tokens.attention_debiasing import attention_debiasing, debias, fit_trend, real_patches, trend_weights
from jaxattn.tokens.baselines import mean_pool, random, uniform
from jaxattn.tokens.dymu import dtome, dymu, dymu_calibration, dymu_thresholds, dymu_unmerge, virtual_unmerge
from jaxattn.tokens.dyvte import dyvte, dyvte_router, init_router, prompt_rows, visual_exit
from jaxattn.tokens.fastervlm import fastervlm, fastervlm_scores
from jaxattn.tokens.flowcut import flow_score, flowcut, flowcut_left, flowcut_scores, flowcut_text
from jaxattn.tokens.focusui import (
    box_share,
    focusui,
    focusui_keep,
    focusui_rows,
    fused_label,
    patch_scores,
    pointer_logits,
    pointer_target,
    region_weight,
    run_ends,
    scorer_loss,
    tie_seed,
)
from jaxattn.tokens.g_search import g_search, g_search_rates, p_sigmoid, p_sigmoid_search
from jaxattn.tokens.hiprune import hiprune, hiprune_scores, hiprune_select
from jaxattn.tokens.holov import holov, holov_crops, holov_quotas, holov_select, holov_tokens
from jaxattn.tokens.k_center import k_center
from jaxattn.tokens.mmtok import content_mask, content_words, mmtok, mmtok_coverage, mmtok_picks, mmtok_select
from jaxattn.tokens.mustdrop import (
    mustdrop,
    mustdrop_keep,
    mustdrop_key_set,
    mustdrop_keys,
    mustdrop_merge,
    mustdrop_merge_plan,
    mustdrop_trim,
    window_similarity,
)
from jaxattn.tokens.quota import RESIZES as QUOTA_RESIZES
from jaxattn.tokens.quota import (
    decouple,
    quota,
    quota_counts,
    quota_frames,
    quota_grid,
    quota_merge,
    quota_resize,
    quota_scores,
    quota_shares,
)
from jaxattn.tokens.sit import init_slimming, sit, slim, slimming_weights
from jaxattn.tokens.staged import average_rows, fastv, pyramiddrop
from jaxattn.tokens.textmonkey import init_perceiver, read_back, textmonkey, textmonkey_redundancy
from jaxattn.tokens.todre import group_ratios, todre, todre_exit, todre_picks, todre_select
from jaxattn.tokens.tokenflex import gated_project, init_projector, pool_grid, tokenflex
from jaxattn.tokens.transprune import token_transition, transprune, transprune_scores
from jaxattn.tokens.vflowopt import (
    last_ratio,
    last_token_agreement,
    patch_entropy,
    recycle,
    vflowopt,
    vflowopt_importance,
    vflowopt_reduce,
    vflowopt_search,
    vflowopt_stages,
)
from jaxattn.tokens.visiondrop import dominant_contextual, visiondrop, visiondrop_encode, visiondrop_stages
from jaxattn.tokens.vmtc_cmai import cmai, cmai_focus, cmai_inhibited, vmtc, vmtc_condense
from jaxattn.tokens.vtc_cls import vtc_cls, vtc_cls_scores
from jaxattn.tokens.yopo import neighbourhood, yopo, yopo_heads, yopo_mask
from jaxattn.tokens.zoo_prune import sensitivity, unit_directions, zoo_prune, zoo_prune_picks, zoo_prune_select

__all__ = [
    "adaptinfer", "adaptinfer_counts", "adaptinfer_layers", "adaptinfer_scores", "adatoken_3d", "adatoken_rates",
    "aim", "aim_merge", "aim_merge_tokens", "as_vit", "as_vit_scores", "attention_debiasing", "attention_shift",
    "average_rows", "box_share", "cmai", "cmai_focus", "cmai_inhibited", "content_mask", "content_words",
    "contribution_curve", "debias", "decouple", "dominant_contextual", "dtome", "dymu", "dymu_calibration",
    "dymu_thresholds", "dymu_unmerge", "dyvte", "dyvte_router", "fastervlm", "fastervlm_scores", "fastv", "fit_trend",
    "flow_score", "flowcut", "flowcut_left", "flowcut_scores", "flowcut_text", "focusui", "focusui_keep",
    "focusui_rows", "fused_label", "g_search", "g_search_rates", "gated_project", "group_ratios", "hiprune",
    "hiprune_scores", "hiprune_select", "holov", "holov_crops", "holov_quotas", "holov_select", "holov_tokens",
    "information_flow", "init_perceiver", "init_projector", "init_router", "init_slimming", "k_center", "last_ratio",
    "last_token_agreement", "layer_flops", "mean_pool", "mmtok", "mmtok_coverage", "mmtok_picks", "mmtok_select",
    "mustdrop", "mustdrop_keep", "mustdrop_key_set", "mustdrop_keys", "mustdrop_merge", "mustdrop_merge_plan",
    "mustdrop_trim", "neighbourhood", "p_sigmoid", "p_sigmoid_search", "pagerank_importance", "patch_entropy",
    "patch_scores", "pointer_logits", "pointer_target", "policy_attention_reference", "pool_grid", "prompt_rows",
    "pyramiddrop", "quota", "quota_counts", "quota_frames", "quota_grid", "quota_merge", "quota_resize",
    "QUOTA_RESIZES", "quota_scores", "quota_shares", "random", "read_back", "real_patches", "recycle",
    "region_weight", "run_ends", "scorer_loss", "sensitivity", "sit", "slim", "slimming_weights", "straight_through",
    "text_prior", "textmonkey", "textmonkey_redundancy", "tie_seed", "todre", "todre_exit", "todre_picks",
    "todre_select", "token_transition", "tokenflex", "transprune", "transprune_scores", "trend_weights", "uniform",
    "unit_directions", "vflowopt", "vflowopt_importance", "vflowopt_reduce", "vflowopt_search", "vflowopt_stages",
    "virtual_unmerge", "visiondrop", "visiondrop_encode", "visiondrop_stages", "visual_exit", "vmtc", "vmtc_condense",
    "vtc_cls", "vtc_cls_scores", "window_similarity", "yopo", "yopo_heads", "yopo_mask", "zoo_prune",
    "zoo_prune_picks", "zoo_prune_select",
]  # fmt: skip
