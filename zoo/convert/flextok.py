"""FlexTok (apple/ml-flextok) <-> ours. Of the official config only known fields are read; nothing is instantiated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.convert import flextok_vae
from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, fuse, split
from zoo.models.flextok import FlexTok, FlexTokConfig, flextok_vit
from zoo.models.flextok_vae import FlexTokVAEConfig
from zoo.nn.conv2d import ConvStackConfig
from zoo.nn.elastic import prefix_mask
from zoo.nn.flow import Guidance, NoiseConfig, add_noise, noise_levels
from zoo.nn.fsq import FSQ, FSQConfig
from zoo.nn.layout import Layout
from zoo.nn.preprocess import PreprocessConfig

_BLOCK = [
    ("attn.wq.*", "attn.q.*"),
    ("attn.wk.*", "attn.k.*"),
    ("attn.wv.*", "attn.v.*"),
    ("attn.proj.*", "attn.out_proj.*"),
    ("mlp.fc1.*", "mlp.gate.*"),
    ("mlp.fc3.*", "mlp.up.*"),
    ("mlp.fc2.*", "mlp.down.*"),
    ("adaLN_modulation.1.*", "modulation.proj.*"),
]
RENAMES = Renames(
    [
        ("vae.vae.*", "vae.*"),
        *below(
            "encoder.module_dict.",
            "encoder.",
            [
                ("enc_patch_emb.patch_proj.*", "patch_embed.*"),
                ("enc_posemb_module.posembs", "positions.table"),
                ("enc_register_module.registers", "registers"),
                *below("enc_transformer.blocks.{}.", "transformer.blocks.{}.", _BLOCK),
                ("enc_to_latents.proj.*", "proj_out.*"),
            ],
        ),
        *below(
            "decoder.module_dict.",
            "decoder.",
            [
                ("dec_from_latents.proj.*", "latent_embed.*"),
                ("dec_registers_posemb_module.posembs", "register_positions.table"),
                ("dec_nested_dropout.dropout_mask_token", "nested_dropout.mask_token"),
                ("dec_latent_dropout.nullcond", "null"),
                ("dec_noise_patch_emb.patch_proj.*", "patch_embed.*"),
                ("dec_patches_posemb_module.posembs", "positions.table"),
                ("dec_time_embedder.mlp.*", "time_embed.*"),
                *below("dec_transformer.blocks.{}.", "transformer.blocks.{}.", _BLOCK),
                ("dec_to_patches.adaLN_modulation.1.*", "modulation.proj.*"),
                ("dec_to_patches.proj.*", "proj_out.*"),
            ],
        ),
    ]
)
_ORDER = (2, 3, 0, 4, 5, 1)  # their chunks (gates first) in the order of ours: shift, scale, gate, twice


def fsq_config_from_official(official: dict[str, Any]) -> FSQConfig:
    """From the arguments of the official FSQ."""
    return FSQConfig(
        levels=tuple(official["levels"]),
        drop_quant=official.get("drop_quant_p") or 0.0,
        corrupt=official.get("corrupt_tokens_p") or 0.0,
        truncate_ids=True,
    )


def noise_config_from_official(official: dict[str, Any]) -> NoiseConfig:
    """From the arguments of MinRFNoiseModule (which spells `stratisfied`)."""
    scale = official.get("mode_scale") or 0.0
    kind: Any = "lognorm" if official.get("ln") else "mode" if scale else "uniform"
    return NoiseConfig(kind=kind, stratified=bool(official.get("stratisfied")), mode_scale=scale)


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of a FlexTok."""
    return "encoder.module_dict.enc_register_module.registers" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "module_dict" in config.get("encoder", {})


def config_from_official(official: dict[str, Any]) -> FlexTokConfig:
    """From the Hub's config.json (a tree of constructor arguments)."""
    enc, dec = official["encoder"]["module_dict"], official["decoder"]["module_dict"]
    trunk_e, trunk_d = enc["enc_transformer"], dec["dec_transformer"]
    patch, channels = enc["enc_patch_emb"]["patch_sizes"][0], enc["enc_patch_emb"]["channels_in"]
    grid = enc["enc_posemb_module"]["max_sizes"][0]
    vae = official.get("vae")
    return FlexTokConfig(
        vae=None if vae is None else _vae_config(vae),
        channels=channels,
        latent_size=grid * patch,
        patch=patch,
        encoder=flextok_vit(trunk_e["dim"], trunk_e["depth"], trunk_e.get("head_dim", 64)),
        decoder=flextok_vit(trunk_d["dim"], trunk_d["depth"], trunk_d.get("head_dim", 64), adaln=True),
        registers=enc["enc_register_module"]["n_max"],
        fsq=fsq_config_from_official(official["regularizer"]),
        encoder_positions=enc["enc_posemb_module"]["posemb_type"],
        decoder_positions=dec["dec_patches_posemb_module"]["posemb_type"],
        register_positions=dec["dec_registers_posemb_module"]["posemb_type"],
        nested_dropout=dec["dec_nested_dropout"].get("size_sampling_mode", "uniform"),
        null_probability=dec["dec_latent_dropout"].get("dropout_prob", 0.0),
        noise=noise_config_from_official(official.get("flow_matching_noise_module", {})),
        time_frequencies=dec["dec_time_embedder"].get("frequency_embedding_size", 256),
        time_max=dec["dec_time_embedder"].get("max_timestep", 1.0),
        sample_posterior=bool((vae or {}).get("sample_posterior", False)),
        preprocess=PreprocessConfig(size=grid * patch * 8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )


def _vae_config(official: dict[str, Any]) -> FlexTokVAEConfig:
    if "block_out_channels" in official:
        return flextok_vae.config_from_official(official)
    z = official["latent_channels"]
    stack = ConvStackConfig(widths=(128, 256, 512, 512), decoder_blocks=3, z_channels=z, mid_attention=True)
    return FlexTokVAEConfig(stack=stack, scaling_factor=official.get("scaling_factor"))


def to_zoo(state: State, config: FlexTokConfig) -> dict[str, Tensor]:
    """Official state dict -> ours: fused projections, and the modulation's chunks in DiT's order."""
    out = RENAMES.to_zoo(state)
    for prefix in _blocks(out, ".attn.q.weight"):
        fuse(out, [f"{prefix}.attn.{part}.weight" for part in "qkv"], f"{prefix}.attn.qkv.weight")
        fuse(out, [f"{prefix}.mlp.{part}.weight" for part in ("gate", "up")], f"{prefix}.mlp.gate_up.weight")
    out = _reorder(out, config, list(_ORDER))
    if config.vae is not None:
        out = _with_vae(out, config.vae, flextok_vae.to_zoo)
    return out


def to_official(state: State, config: FlexTokConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = dict(state)
    if config.vae is not None:
        out = _with_vae(out, config.vae, flextok_vae.to_official)
    out = _reorder(out, config, [_ORDER.index(i) for i in range(6)])
    for prefix in _blocks(out, ".attn.qkv.weight"):
        split(out, f"{prefix}.attn.qkv.weight", [f"{prefix}.attn.{part}.weight" for part in "qkv"])
        split(out, f"{prefix}.mlp.gate_up.weight", [f"{prefix}.mlp.{part}.weight" for part in ("gate", "up")])
    return RENAMES.to_official(out)


def _with_vae(state: dict[str, Tensor], config: FlexTokVAEConfig, convert: Any) -> dict[str, Tensor]:
    inner = {name.removeprefix("vae."): state.pop(name) for name in list(state) if name.startswith("vae.")}
    return state | {f"vae.{name}": value for name, value in convert(inner, config).items()}


def _blocks(state: State, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in state if name.endswith(suffix) and ".transformer." in name]


def _reorder(state: dict[str, Tensor], config: FlexTokConfig, order: list[int]) -> dict[str, Tensor]:
    groups, width = config.decoder.adaln_groups, config.decoder.width
    for name in state:
        if ".transformer." in name and ".modulation.proj." in name:
            chunks = state[name].unflatten(0, (groups, 6, width))
            state[name] = chunks[:, order].flatten(0, 2)
    return state


def replay(case: Case) -> dict[str, Tensor]:
    """FSQ alone, the noise module alone, or the whole model on VAE latents."""
    if "levels" in case.config:
        return _replay_fsq(case)
    if "clean" in case.inputs:
        return _replay_noise(case)
    return _replay_model(case)


def _replay_fsq(case: Case) -> dict[str, Tensor]:
    fsq = FSQ(fsq_config_from_official(case.config)).eval()
    z = case.inputs["z"].clone().requires_grad_()
    result = fsq(z)
    (result.codes * case.inputs["upstream_grad"]).sum().backward()
    step = fsq.vocab_size // 500 if fsq.vocab_size > 4096 else 1
    sample = fsq.lookup(torch.arange(0, fsq.vocab_size, step))
    rows = case.outputs["codebook_sample"].shape[0] if "codebook_sample" in case.outputs else len(sample)
    return {
        "bounded": fsq.bound(z),
        "quant": result.codes,
        "tokens": result.ids,
        "grad_z": z.grad,
        "ids_to_embedding": fsq.lookup(case.inputs["ids"]),
        "codebook_sample": sample[:rows],
        "levels": fsq.levels,
        "basis": fsq.basis,
    }


def _replay_noise(case: Case) -> dict[str, Tensor]:
    out = {}
    for suffix, run in case.run["suffixes"].items():
        config = NoiseConfig(
            kind={"ln": "lognorm"}.get(run["kind"], run["kind"]),
            stratified=run.get("stratified", False),
            mode_scale=run.get("mode_scale", 0.0),
        )
        uniform = config.kind != "lognorm" or config.stratified
        level = noise_levels(config, case.inputs["uniform_draw" if uniform else "normal_draw"])
        out[f"sigmas.{suffix}"] = level
        out[f"noised.{suffix}"] = add_noise(case.inputs["clean"], case.inputs["noise"], level)
    return out


@torch.no_grad()
def _replay_model(case: Case) -> dict[str, Tensor]:
    config = config_from_official(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model = FlexTok(config).eval()
    model.load_state_dict(state)
    latents, noise, t = case.inputs["vae_latents"], case.inputs["noise"], case.inputs["timesteps"]
    keep = case.inputs["keep_k"]
    encoder, decoder = model.encoder, model.decoder
    batch, k, grid = len(latents), config.registers, config.latent_size // config.patch
    packed = lambda x: _pack(x, case)
    stages = {"enc.patch_emb": encoder.patch_embed, "enc.patches_with_posemb": encoder.positions}
    stages |= {"enc.latents": encoder, "enc.out": encoder.transformer}
    stages |= {f"enc.block{i}": block for i, block in enumerate(encoder.transformer.blocks)}
    with Capture(stages) as seen:
        result = model.quantizer(encoder(latents))
    out = {name: packed(x) if "block" in name else x for name, x in seen.all().items()}
    registers = out.pop("enc.out")
    n = registers.shape[1] - k
    out |= {"enc.patches_out": registers[:, :n].unflatten(1, (grid, grid)), "enc.registers_out": registers[:, n:]}
    out["enc.packed_in"] = packed(encoder.pack(latents))
    mask = Layout("prefix", prefix=n).dense(n + k)[0]
    mask[:n, n:] = False
    out["enc.attn_mask"] = torch.block_diag(*[mask.float()] * batch).bool()
    out |= {"quant": result.codes, "tokens": result.ids}

    noised = add_noise(latents, noise, t)
    never = torch.zeros(batch, dtype=torch.bool)
    stages = {"dec.temb": decoder.time_embed, "dec.packed_out": decoder.transformer}
    stages |= {f"dec.block{i}": block for i, block in enumerate(decoder.transformer.blocks)}
    with Capture(stages) as seen:
        velocity = decoder(noised, t, result.codes)
    out |= {name: packed(x) if name != "dec.temb" else x for name, x in seen.all().items()}
    repa = case.config["decoder"]["module_dict"]["dec_transformer"].get("intermediate_layers") or [1]
    out["dec.repa_layer"] = out[f"dec.block{repa[0]}"]
    out |= {"noised": noised, "dec.velocity": velocity, "rf_loss": F.mse_loss(velocity, noise - latents)}
    out["dec.velocity_keep_k"] = decoder(noised, t, result.codes, keep, never)
    out["dec.velocity_uncond"] = decoder(noised, t, result.codes, None, ~never)
    run = case.run
    plain = Guidance(run.get("cfg_scale", 3.0))
    apg = Guidance(plain.scale, True, run.get("momentum", -0.5), run.get("norm_threshold", 2.5), run.get("eta", 0.0))
    for name, guidance in (("cfg", plain), ("apg", apg), ("cfg1", Guidance(1.0))):
        ids = torch.where(prefix_mask(keep, k), result.ids, torch.zeros_like(result.ids))
        out[f"sample.{name}"] = model.decode_latents(ids, run.get("steps", 3), guidance, keep, start=noise)
    return out


def _pack(x: Tensor, case: Case) -> Tensor:
    """[B, L, D] -> [1, B·L, D]: the official form, where all pictures stand in one sequence, padded with zeros."""
    x = x.flatten(0, 1)[None]
    multiple = case.config["encoder"]["module_dict"]["enc_seq_packer"].get("pad_to_multiple") or 1
    return F.pad(x, (0, 0, 0, -x.shape[1] % multiple))
