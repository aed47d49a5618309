from longalign.backbones import LoraConfig
from longalign.testing import check_backbone
from longalign.testing.tiny import tiny_sd


def test_my_part_conforms(tmp_path):
    config = {"name": "my-part", "checkpoint": str(tiny_sd(tmp_path)), "scale": 1.5}
    check_backbone(config, lora=LoraConfig(rank=2, dropout=0.0))
