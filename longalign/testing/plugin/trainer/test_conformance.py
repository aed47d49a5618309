from longalign.testing import check_trainer
from longalign.testing.tiny import tiny_sd


def test_my_part_conforms(tmp_path):
    checkpoint = str(tiny_sd(tmp_path))
    check_trainer(
        {
            "backbone": {"name": "sd", "checkpoint": checkpoint},
            "encoder": {"name": "clip-segment", "checkpoint": checkpoint},
            "trainer": {"name": "my-part", "lora": {"rank": 2}},
            "data": {"name": "scenes", "size": 8},
            "loop": {"batch_size": 2, "workers": 0},
        }
    )
