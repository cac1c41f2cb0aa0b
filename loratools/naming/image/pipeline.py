"""Parts of the pipelines of diffusers that adapters are for: what stands before the names of their modules."""

from __future__ import annotations

# What removes the noise. Wan 2.2 has two of them, and a file of ComfyUI's or of a trainer is for one.
SECOND = "transformer_2"
DENOISERS = ("unet", "transformer", SECOND)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# What stands between text and denoiser (LTX-2, Anima), and further transformers (Ideogram 4, MiniMax-H3).
OTHER_PARTS = ("connectors", "text_conditioner", "conditional_transformer", "transformer_ref")
PIPELINE_PARTS = (*DENOISERS, *TEXT_ENCODERS, *OTHER_PARTS)
