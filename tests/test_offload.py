"""What waits in host memory: what is picked, what is counted, and that images stay the same."""

from pathlib import Path

import pytest
import torch
from tiny_pipeline import save_tiny, tiny_pipeline, wide_transformer

from l2p_fast import sample
from l2p_fast.errors import FieldError, UserError
from l2p_fast.formats.header import Stored
from l2p_fast.loading import build_empty, load_text_encoders
from l2p_fast.quantize import products
from l2p_fast.sampling import footprint, session
from l2p_fast.sampling.offload import BY_NEED, CONTEXT, SPARE, arrange, pick
from l2p_fast.sampling.request import OFFLOAD, Request, Setup
from l2p_fast.sampling.session import Session

PEAKS = {"none": 20 * 10**9, "text": 14 * 10**9, "blocks": 2 * 10**9, "model": 13 * 10**9, "sequential": 10**9}
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}


def qwen3_4b() -> dict[str, Stored]:
    """The published text encoder's tensors."""
    dim, inner = 2560, 9728
    shapes = {"embed_tokens.weight": (151936, dim), "norm.weight": (dim,)}
    block = {f"mlp.{name}_proj.weight": (inner, dim) for name in ("gate", "up")} | {
        "mlp.down_proj.weight": (dim, inner)
    }
    block |= {f"self_attn.{name}_proj.weight": (1024, dim) for name in "kv"}
    block |= {"self_attn.q_proj.weight": (4096, dim), "self_attn.o_proj.weight": (dim, 4096)}
    for i in range(36):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    return {name: Stored(Path("x"), name, "BF16", shape, 0) for name, shape in shapes.items()}


def published(patch: int, side: int, quantize: str) -> dict[str, int]:
    """The planner's peaks for the published model on a GPU, in bf16, one half of guidance after the other."""
    model = build_empty({"all_patch_size": (patch,)})
    if quantize != "stored":
        products.quantize_blocks(model, quantize)
    memory = footprint.expected(model, torch.bfloat16, torch.device("meta"), (side, side), guided=True)
    encoder = footprint.encoder_parts(qwen3_4b(), torch.bfloat16, quantize)
    return footprint.peaks(model, torch.bfloat16, memory, encoder)


def test_the_reach_of_small_cards():
    four, eight, full = published(64, 4096, "nf4"), published(64, 4096, "int8"), published(160, 10240, "stored")
    assert four["none"] < 7.5e9 and four["text"] < 6e9
    assert eight["text"] < 11.5e9 < eight["none"]
    assert full["text"] < 24e9 and full["blocks"] < 6e9
    for peaks in (four, eight, full):
        assert peaks["none"] > peaks["text"] > peaks["blocks"] and peaks.keys() == set(OFFLOAD) - {"auto"}
    assert pick(8 * 10**9, lambda: four)[0] == "text" and pick(24 * 10**9, lambda: full)[0] == "text"


@pytest.mark.parametrize(
    ("gigabytes", "how"), [(24, "none"), (21, "text"), (16, "text"), (15, "blocks"), (1, "blocks")]
)
def test_the_first_that_fits_is_picked(gigabytes, how):
    picked, why = pick(gigabytes * 10**9, lambda: PEAKS)
    assert picked == how and f"{PEAKS[how] / 1e9:.1f} GB of {gigabytes}.0 GB that are free" in why
    assert ("may not do" in why) == (PEAKS[how] * (1 + SPARE) + CONTEXT > gigabytes * 10**9)


def test_a_device_without_memory_of_its_own_needs_none():
    assert pick(None, lambda: 1 / 0) == ("none", " (auto: this device shares the host's memory)")


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("how", ["text", "blocks"])
def test_images_stay_the_same(how, quantize):
    def pipe():
        made = tiny_pipeline(transformer=wide_transformer(), dtype=torch.bfloat16)
        if quantize:
            products.quantize_blocks(made.transformer, quantize)
            products.quantize_block(made.text_encoder, "int8", rounds_inputs=False)
        return made

    def draw(one, seed):
        return one("a", generator=torch.Generator().manual_seed(seed), guidance_scale=2.0, **SMALL).images

    plain, offloaded = pipe(), pipe()
    arrange(offloaded, how, torch.device("cpu"))
    assert offloaded.execution_device.type == "cpu"
    for seed in range(2):  # the second run finds all in its place again
        assert torch.equal(draw(offloaded, seed), draw(plain, seed))
    hooked = [
        any(
            registry.get_hook("group_offloading")
            for module in model.modules()
            if (registry := getattr(module, "_diffusers_hook", None))
        )
        for model in (offloaded.text_encoder, offloaded.transformer)
    ]
    assert hooked == [True, how == "blocks"]


@pytest.mark.parametrize("free", [None, 10**10])
def test_a_session_picks_and_says_so(tmp_path, monkeypatch, free):
    monkeypatch.setattr(session, "free_bytes", lambda device: free)
    setup = Setup(str(save_tiny(tmp_path / "pipe")), device="cpu", dtype="fp32", offload="auto")
    made = Session.load(setup, 32)
    assert made.setup.offload == "none" and any(line.startswith("offload    none (auto: ") for line in made.report)
    drawing = made.draw(Request("a", 0, height=32, width=32, steps=2))
    assert drawing.settings["offload"] == "none"
    plain = Session.load(Setup(setup.model, device="cpu", dtype="fp32"), 32)
    assert not any(line.startswith("offload") for line in plain.report)
    assert plain.draw(Request("a", 0, height=32, width=32, steps=2)).image.tobytes() == drawing.image.tobytes()


def test_what_is_counted_of_a_text_encoder_is_held(tmp_path):
    folder = save_tiny(tmp_path / "pipe")
    tensors = footprint.open_encoder(folder).tensors
    for quantize in ("stored", "int8"):
        ((encoder, _),) = load_text_encoders(folder, "zimage", torch.bfloat16, quantize=quantize)
        held = sum(value.nbytes for name, value in encoder.state_dict().items() if "rotary" not in name)
        assert sum(footprint.encoder_parts(tensors, torch.bfloat16, quantize)) == held


def test_a_dry_run_plans_for_a_card_that_is_not_here(tmp_path, capsys):
    model = save_tiny(tmp_path / "pipe")
    asked = ["a", "--model", str(model), "--res", "32", "--dry-run"]
    assert sample.main([*asked, "--device-gb", "8", "--offload", "auto", "--quantize", "int8"]) == 0
    said = capsys.readouterr().out
    assert "on a GPU with 8 GB free" in said and "none: " in said and "of 8.0 GB that are free)" in said
    assert all(f"{how} " in said.split("at once: ")[1] for how in BY_NEED)
    assert sample.main([*asked, "--device-gb", "8", "--offload", "blocks", "--text-encoder", "some/repo"]) == 0
    said = capsys.readouterr().out
    assert "without the text encoder, as some/repo is not here" in said and "blocks: " in said
    for wrong in (["--device-gb", "8"], ["--dry-run", "--device-gb", "0"]):
        with pytest.raises(UserError, match="--device-gb is a GPU's free memory in GB"):
            sample.main(["a", *wrong])


def test_a_cpu_has_nowhere_else_to_go():
    for how in ("text", "blocks"):
        with pytest.raises(FieldError, match="needs a GPU"):
            Setup(device="cpu", offload=how)
    assert Setup(device="cpu", offload="auto").offload == "auto"
