"""The bundled synthetic scenes: rendering, captions, the check of facts in images, and the weights of tiny models.

A fact is one statement of a caption, such as the colour of an object. Public names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.mini.captions import Caption as Caption
    from longalign.mini.captions import Fact as Fact
    from longalign.mini.captions import Sentence as Sentence
    from longalign.mini.captions import describe as describe
    from longalign.mini.oracle import fact_accuracy as fact_accuracy
    from longalign.mini.oracle import read_scenes as read_scenes
    from longalign.mini.oracle import verdicts as verdicts
    from longalign.mini.scenes import Scene as Scene
    from longalign.mini.scenes import Thing as Thing
    from longalign.mini.scenes import render as render
    from longalign.mini.scenes import render_batch as render_batch
    from longalign.mini.scenes import sample_scene as sample_scene

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Caption": "captions",
        "Fact": "captions",
        "Scene": "scenes",
        "Sentence": "captions",
        "Thing": "scenes",
        "describe": "captions",
        "fact_accuracy": "oracle",
        "read_scenes": "oracle",
        "render": "scenes",
        "render_batch": "scenes",
        "sample_scene": "scenes",
        "verdicts": "oracle",
    },
)
