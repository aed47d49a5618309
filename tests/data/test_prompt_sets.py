"""Prompt sets of benchmarks: each file format, detection by columns, errors, the hash."""

import csv
import json

import pytest

from longalign.data.prompts.formats import SETS
from longalign.data.prompts.sets import prompts_hash, read_prompt_set

QUESTIONS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]


def write_csv(path, header, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_questions(path, *ids):
    rows = [
        (id, f"text of {id}", "", number, 0, broad, detailed)
        for id in ids
        for number, broad, detailed in [(1, "entity", "whole"), (2, "attribute", "color"), (3, "entity", "part")]
    ]
    return write_csv(path, QUESTIONS, *rows)


def unigenbench(path, *indices):
    keys = {
        "Primary Categories": "Art",
        "Subjects": "Scene",
        "Testpoints": ["Style", "Action - Hand", "Action - State"],
    }
    rows = [(i, f"prompt {i} of {path.stem}", json.dumps(keys)) for i in indices]
    return write_csv(path, ["index", "prompt_en", "sub_dims_en"], *rows)


def test_read_plain_prompts_keeps_empty_lines_and_numbers(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \n")
    prompts = read_prompt_set(path)
    assert (prompts.name, prompts.texts) == ("plain", ["one", "", "two"])
    assert [prompt.id for prompt in prompts.prompts] == ["0", "1", "2"]


def test_read_plain_jsonl_with_ids_and_labels(tmp_path):
    rows = [{"prompt": "a", "id": 7, "labels": {"topic": "x", "tags": ["p", "q", "p"], "none": None}}, {"text": "b"}]
    prompts = read_prompt_set(write_jsonl(tmp_path / "prompts.jsonl", *rows))
    assert [(p.id, p.text) for p in prompts.prompts] == [("7", "a"), ("1", "b")]
    assert prompts.prompts[0].labels == {"topic": ("x",), "tags": ("p", "q")}
    assert prompts.prompts[1].labels == {}


def test_read_dpg_bench_folder_of_texts(tmp_path):
    for name in ("10", "2", "whoops5"):
        (tmp_path / f"{name}.txt").write_text(f"prompt {name}\n")
    for source in (tmp_path, f"dpg-bench:{tmp_path}"):
        prompts = read_prompt_set(source)
        assert (prompts.name, prompts.texts) == ("dpg-bench", ["prompt 10", "prompt 2", "prompt whoops5"])
        assert [p.id for p in prompts.prompts] == ["10", "2", "whoops5"]


def test_read_dpg_bench_jsonl_only_by_name(tmp_path):
    path = write_jsonl(tmp_path / "dpg.jsonl", {"id": "whoops5", "prompt": "a"})
    assert read_prompt_set(path).name == "plain"
    assert read_prompt_set(f"dpg-bench:{path}").name == "dpg-bench"


def test_read_questions_of_dpg_bench_and_dsg(tmp_path):
    path = write_questions(tmp_path / "questions.csv", "whoops_5", "vrd_1")
    for name, source in (("dpg-bench", {}), ("dsg", {"source": ("whoops",)})):
        prompts = read_prompt_set(f"{name}:{path}")
        assert [(p.id, p.text) for p in prompts.prompts] == [
            ("whoops_5", "text of whoops_5"),
            ("vrd_1", "text of vrd_1"),
        ]
        categories = {"category": ("entity", "attribute"), "subcategory": ("whole", "color", "part")}
        assert prompts.prompts[0].labels == {**source, **categories}


def test_questions_without_name_are_ambiguous(tmp_path):
    path = write_questions(tmp_path / "questions.csv", "whoops_5")
    with pytest.raises(ValueError, match=r"(?=.*\bdpg-bench:)(?=.*\bdsg:)"):
        read_prompt_set(path)


def test_read_unigenbench_pairs_short_and_long(tmp_path):
    for stem in ("test_prompts_en", "test_prompts_en_long"):
        unigenbench(tmp_path / f"{stem}.csv", 0, 1)
    prompts = read_prompt_set(tmp_path)
    assert prompts.name == "unigenbench"
    assert [(p.id, p.pair) for p in prompts.prompts] == [
        ("short/0", "0"), ("short/1", "1"), ("long/0", "0"), ("long/1", "1"),
    ]  # fmt: skip
    assert prompts.prompts[2].labels == {
        "length": ("long",),
        "category": ("Art",),
        "subject": ("Scene",),
        "dimension": ("Style", "Action"),
        "testpoint": ("Style", "Action - Hand", "Action - State"),
    }


def test_unigenbench_damaged_labels_warn_with_line(tmp_path, caplog):
    path = write_csv(tmp_path / "en.csv", ["index", "prompt_en", "sub_dims_en"], (3, "a", '{"Testpoints": ["b" "c"]}'))
    (prompt,) = read_prompt_set(path).prompts
    assert prompt.labels == {"length": ("short",)}
    assert "line 2" in caplog.text and "sub_dims_en" in caplog.text


def test_read_longbench(tmp_path):
    rows = [{"instruction": text, "label": [{"Object": "a dog"}]} for text in ("a", "b")]
    prompts = read_prompt_set(write_jsonl(tmp_path / "instruction.jsonl", *rows))
    assert (prompts.name, prompts.texts, prompts.prompts[1].id) == ("longbench-t2i", ["a", "b"], "1")


def test_read_detailmaster(tmp_path):
    row = {"image_id": "1.jpg", "polished_prompt": "long", "ori_prompt": "short", "dataset_target": "ln_coco"}
    path = tmp_path / "mini.json"
    path.write_text(json.dumps([row, {**row, "dataset_target": "docci", "mini_bench_target": "object"}]))
    prompts = read_prompt_set(path)
    assert (prompts.name, prompts.texts) == ("detailmaster", ["long", "long"])
    assert [p.id for p in prompts.prompts] == ["ln_coco_1.jpg", "docci_1.jpg"]
    assert prompts.prompts[1].labels == {"source": ("docci",), "target": ("object",)}


def test_read_tiif_counts_lines_of_each_file(tmp_path):
    for kind in ("color", "action+3d"):
        rows = [{"type": kind, "short_description": f"s{i}", "long_description": f"l{i} {kind}"} for i in range(2)]
        write_jsonl(tmp_path / f"{kind}.jsonl", *rows)
    prompts = read_prompt_set(f"tiif:{tmp_path}").prompts
    assert [p.id for p in prompts[:4]] == [
        "action+3d/0/short",
        "action+3d/0/long",
        "action+3d/1/short",
        "action+3d/1/long",
    ]
    assert (prompts[-1].text, prompts[-1].pair) == ("l1 color", "color/1")
    assert prompts[-1].labels == {"type": ("color",), "length": ("long",)}


def test_read_geneval_keeps_the_row(tmp_path):
    row = {"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
    prompts = read_prompt_set(write_jsonl(tmp_path / "evaluation_metadata.jsonl", row))
    assert (prompts.name, prompts.prompts[0].id) == ("geneval", "00000")
    assert prompts.prompts[0].labels == {"tag": ("two_object",)} and prompts.prompts[0].row == row


def test_read_oneig_ids_are_unique_across_categories(tmp_path):
    header = ["category", "id", "prompt_en", "type", "prompt_length", "class"]
    rows = [("Portrait", "000", "a", "T, P", "short", "None"), ("Text_Rendering", "000", "b", "NP", "long", "poster")]
    prompts = read_prompt_set(write_csv(tmp_path / "OneIG-Bench.csv", header, *rows)).prompts
    assert [p.id for p in prompts] == ["Portrait/000", "Text_Rendering/000"]
    assert prompts[0].labels == {"category": ("Portrait",), "type": ("T", "P"), "length": ("short",)}
    assert prompts[1].labels["style"] == ("poster",)


def test_wrong_columns_are_listed_with_expected_ones(tmp_path):
    path = unigenbench(tmp_path / "en.csv", 0)
    with pytest.raises(ValueError, match=r"line 2.*tag, include, prompt .*index, prompt_en, sub_dims_en"):
        read_prompt_set(f"geneval:{path}")
    path = write_csv(tmp_path / "other.csv", ["caption"], ("a",))
    with pytest.raises(ValueError, match=r"prompt_en.*oneig.*caption"):
        read_prompt_set(path)
    path = write_jsonl(tmp_path / "x.jsonl", {"instruction": "a", "label": []}, {"instruction": "b"})
    with pytest.raises(ValueError, match=r"line 2.*instruction, label.*instruction$"):
        read_prompt_set(path)


def test_read_prompt_set_errors_name_what_is_wrong(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        read_prompt_set(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match=r"'dpgbench'.*'dpg-bench'"):
        read_prompt_set("dpgbench:prompts")
    with pytest.raises(FileNotFoundError, match=r"zzz.*longbench-t2i"):
        read_prompt_set("zzz:prompts")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.txt; check the path$"):
        read_prompt_set("dsg:nowhere.txt")
    (tmp_path / "prompts.md").write_text("a")
    with pytest.raises(ValueError, match=r"\.txt, \.csv, \.json, \.jsonl"):
        read_prompt_set(tmp_path / "prompts.md")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"bad\.json"):
        read_prompt_set(f"detailmaster:{tmp_path / 'bad.json'}")
    path = write_jsonl(tmp_path / "twice.jsonl", {"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"})
    with pytest.raises(ValueError, match="'x'"):
        read_prompt_set(path)
    path = write_jsonl(tmp_path / "long.jsonl", {"instruction": " ", "label": []})
    with pytest.raises(ValueError, match=r"line 1.*'instruction'"):
        read_prompt_set(path)


def test_folder_of_several_sets_is_rejected(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", {"prompt": "a"})
    write_jsonl(tmp_path / "b.jsonl", {"instruction": "b", "label": []})
    with pytest.raises(ValueError, match="plain, longbench-t2i"):
        read_prompt_set(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty .*\.csv, \.json, \.jsonl"):
        read_prompt_set(tmp_path / "empty")


def test_sets_are_listed():
    assert SETS[0] == "plain" and {"dpg-bench", "tiif", "oneig"} <= set(SETS)


def test_prompts_hash_normalizes_texts_but_not_their_order():
    assert prompts_hash(["a b", "é"]) == prompts_hash([" a\n b ", "e\u0301"])
    assert prompts_hash(["a b", "é"])[:12] == "456184b8c6ae"  # of the JSON text ["a b", "\\u00e9"]
    assert len({prompts_hash(texts) for texts in (["a", "b"], ["b", "a"], ["a b"], ["ab"], ["a"], [])}) == 6
