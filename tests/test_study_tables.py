"""What the study says of its cells, and which scenes it asks: hand-made cells, small pictures."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t, wilcoxon
from test_scenes import textures

from benchmarks import faithfulness, pairs, report, study
from benchmarks.faithfulness import Cell, Settings
from captum_fam.scenes import shared_object_scenes

SETTINGS = Settings(pairs=4, masked=4, faithful=2)


def cell(encoder="efficientnet_lite0", weights="trained", source="hard", half=1, right=None, used=(1, 1, 1, 1), **more):
    """A cell of four pairs; ``right``: which of them each method finds."""
    values = {m: {report.RIGHT: v, "rank accuracy": v, "pointing game": v} for m, v in (right or {}).items()}
    for m in values:
        values[m][f"{report.RIGHT}, swapped"] = [0.0] * len(values[m][report.RIGHT])
    return {
        "cell": {"encoder": encoder, "weights": weights, "source": source, "half": half},
        "settings": dict(vars(SETTINGS)),
        "values": values,
        "used": [bool(x) for x in used],
        **more,
    }


def everything(match=(1.0, 1, 1, 1), relax=(0.0, 0, 0, 0), integrated=0.9, many=0.5):
    """Cells of two encoders from which every table can be made."""
    right = {
        report.FAM: [1.0, 0, 0, 1],
        "best match": list(match),
        "match less others": list(match),
        "integrated": [1.0, 0, 1, 0],
        "random": [0.0, 0, 0, 1],
    }
    masks = {m: [0.0, 0, 0, 0] for m in ("Distance Explainer", *report.LESS)} | {"RELAX": list(relax)}
    costs = dict.fromkeys(right, (2.0, 2.0, 0.5)) | {"integrated": (9.0, 17.0, 0.5)}
    found = []
    for name in ("efficientnet_lite0", "vit_mean"):
        main = cell(name, right=right | masks, used=[1, 1, 1, 1], costs=costs)
        for m, ahead in {
            **dict.fromkeys(main["values"], 0.2),
            **dict.fromkeys(report.KNOWN, 0.3),
            "integrated": integrated,
            report.MANY: many,
        }.items():
            of = main["values"].setdefault(m, {})
            for b in ("blur", "mean"):
                of |= {f"insertion, {b}": [ahead, ahead + 0.1], f"deletion, {b}": [0.0, 0.1]}
            of |= {"pair insertion, mean": [0.4, 0.4], "pair deletion, mean": [0.1, 0.1]}
        none = {m: [0.0] * 4 for m in right | masks}
        places = {"places": {m: {k: [1.0, 0, 0, 0] for k in PLACES} for m in ("CorrespondenceMap", "chance")}}
        main |= places
        found += [
            main,
            cell(name, "untrained", right=none, **places),
            cell(name, "shuffled", right=none),
            cell(name, half=0, right=right | {"best match": [1.0, 1, 1, 0]}),
            cell(name, source="hard, all", right=right),
            cell(name, source="medium", right=right, **places),
            cell(name, "untrained", "medium", right=none, **places),
            cell(name, source="photos", right=right),
        ]
    found += [
        cell("simclr", weights, source, right=right)
        for weights, source in (("trained", "medium"), ("untrained", "medium"), ("trained", "hard, all"))
    ]
    return found


PLACES = ("strongest pair", "found in the reference", "found in the image")


@pytest.fixture(autouse=True)
def few_count(monkeypatch):
    monkeypatch.setattr(report, "LEAST_USED", 3)


def verdicts(cells):
    rows = [row.split(" | ") for row in report.goals(report.Study(cells), "good").splitlines()[2:]]
    return ["**" not in row[1] for row in rows], rows


def test_all_goals_are_reached_by_cells_that_reach_them():
    reached, rows = verdicts(everything())
    assert reached == [True] * 13
    assert "*best match ¹*" in rows[0][0]
    assert "*match less others ¹ ²*" in rows[5][0]
    assert rows[0][2] == "+1.00 [1.00, 1.00] |"
    assert rows[1][2] == "1.00 [1.00, 1.00]; 2 encoders, 8 pairs |"
    assert "RELAX, 200 masks: 0.00 [0.00, 0.00], on the same pairs +1.00 [1.00, 1.00]" in rows[3][2]
    assert rows[4][2] == "2.00, and 0.5 once a call |"
    assert rows[9][2] == "2.00, and 12.5 once a call |"  # the others are embedded
    assert rows[10][2] == "blur +0.70 [0.70, 0.70]; mean +0.70 [0.70, 0.70]; 2 encoders, 4 pairs |"


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"relax": (1.0, 1, 1, 1)}, [3, 8]),
        ({"relax": (1.0, 1, 1, 0)}, [3, 8]),  # lower, but the intervals touch
        ({"integrated": 0.4}, [11]),
        ({"integrated": 0.2}, [10, 11]),  # level is not above
    ],
)
def test_a_goal_that_is_missed_is_said_to_be(changed, missed):
    reached, _ = verdicts(everything(**changed))
    assert [n for n, ok in enumerate(reached) if not ok] == missed


def test_the_map_is_chosen_on_half_0_and_judged_on_half_1():
    cells = everything(match=(0.0, 0, 0, 0))
    for c in cells:
        if c["cell"]["half"] == 0:
            c["values"]["best match"][report.RIGHT] = [1.0, 1, 1, 1]
    reached, rows = verdicts(cells)
    assert "*best match ¹*" in rows[0][0]  # though FAM is better on half 1
    assert reached[:3] == [False] * 3


def test_a_map_that_sees_other_references_is_judged_beside_masks_that_see_them():
    cells = everything()
    for c in cells:
        if c["cell"]["half"] == 1 and "RELAX less others" in c["values"]:
            c["values"]["RELAX less others"][report.RIGHT] = [1.0] * 4
    reached, _ = verdicts(cells)
    assert [n for n, ok in enumerate(reached) if not ok] == [8]


def test_every_table_can_be_made_and_the_summary_is_found_by_the_pages(tmp_path):
    drawn = {half: {"kept": [[0, 1]] * 4, "drawn": 64} for half in ("0", "1")}
    report.write_report(everything(), ["a-cell"], drawn, tmp_path, "the command")
    text = (tmp_path / "README.md").read_text()
    assert re.findall(r"^\| method \| right object \| faithfulness .*?\n\n", text, re.M | re.S)
    assert "half 0: 4 of 64" in text
    assert "**Not measured yet**: a-cell." in text
    assert "| outline of all objects | +0.10 [0.10, 0.10] | " in text
    assert "| best match ¹ | 1.00 [1.00, 1.00] | +1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in text
    with (tmp_path / "results.csv").open() as file:
        assert "efficientnet_lite0,untrained,hard,1,CorrespondenceMap,strongest pair,4,0.2500" in file.read()


def test_masks_that_saw_fewer_pairs_are_compared_on_those():
    one, two = {"a": np.array([1.0, 1, 0, 0]), "b": np.ones(2)}, {"a": np.array([0.0, 1])}
    (found,) = report.less(one, two).items()
    assert found[0] == "a"
    assert found[1].tolist() == [1, 0]


def test_pairs_that_are_not_used_do_not_count_nor_do_encoders_that_use_few():
    right = {report.FAM: [1.0, 0, 1]}  # of three pairs of four
    cells = [
        cell(right=right, used=[1, 1, 1, 0]),
        cell("vit_mean", right=right, used=[0, 1, 1, 1]),  # the fourth is not asked of the map, but is used
        cell("efficientnet_lite2", right=right, used=[1, 1, 0, 0]),
    ]
    found = report.Study(cells).samples(report.FAM, report.RIGHT, used=True)
    assert [*found] == ["efficientnet_lite0", "vit_mean"]
    assert report.Study(cells).mean(report.FAM, report.RIGHT, used=True)[0] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_pairs_that_are_not_used_can_be_asked_alone():
    cells = [cell(right={report.FAM: [1.0, 0, 1, 0]}, used=[1, 0, 0, 0])]
    mean, low, high = report.Study(cells).mean(report.FAM, report.RIGHT, used=False)
    assert mean == pytest.approx(1 / 3)
    assert low < mean < high


def test_few_pairs_have_an_interval_as_wide_as_students():
    values = np.random.default_rng(1).normal(size=8)
    mean, low, high = report.mean_over([values])
    half = t.ppf(0.975, 7) * values.std(ddof=1) / 8**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)


def test_families_are_what_is_tested():
    margins = {
        "efficientnet_lite0": 0.5,
        "efficientnet_lite1": 1.0,
        "vit_token": 0.25,
        "bundled": 0.5,
        "simclr": -0.25,
        "clip": 0.5,
    }
    cells = [
        cell(name, source="medium", right={report.FAM: [0.5] * 4, "best match": [0.5 + m] * 4})
        for name, m in margins.items()
    ]
    expected = wilcoxon([0.5625, -0.25, 0.5]).pvalue
    assert report.Study(cells).p_value("best match", "medium") == pytest.approx(expected)
    assert report.Study(cells).p_value(report.FAM, "medium") == 1


def test_the_passes_of_masks_are_those_of_the_settings_and_one_of_the_reference():
    of = report.Study(everything())
    assert of.passes("RELAX") == (201, 201, 0)
    assert of.passes(report.MANY) == (1001, 1001, 0)
    assert of.passes("integrated") == (9, 17, 0.5)
    assert np.isnan(of.passes("Grad-CAM")).all()


def test_cells_have_names_of_their_own_and_those_of_the_main_table_come_first():
    cells = faithfulness.cells()
    assert len({c.name for c in cells}) == len(cells)
    assert [c.is_main for c in cells].index(False) == len(study.GROUPS["good"])
    assert not [c for c in cells if c.source == "hard" and c.encoder in (*pairs.REFEREES, *study.GROUPS["weak"])]


@pytest.mark.parametrize(
    ("cell", "masked"),
    [
        (Cell("efficientnet_lite0", "trained", "hard"), 40),
        (Cell("efficientnet_lite2", "trained", "hard"), 16),
        (Cell("efficientnet_lite2", "untrained", "hard"), 8),
        (Cell("efficientnet_lite0", "trained", "medium"), 10),
        (Cell("efficientnet_lite0", "untrained", "medium"), 0),
        (Cell("efficientnet_lite0", "trained", "hard", 0), 0),
        (Cell("efficientnet_lite0", "shuffled", "hard"), 0),
        (Cell("efficientnet_lite0", "trained", "photos"), 0),
        (Cell("simclr", "untrained", "medium"), 10),
        (Cell("simclr", "trained", "hard, all"), 0),
        (Cell("mean_colour", "trained", "hard"), 20),
    ],
)
def test_how_many_pairs_masks_and_fame_explain(cell, masked):
    assert cell.masked(Settings()) == masked
    assert cell.descended(Settings()) == min(16, masked)


def test_the_time_of_a_cell_grows_with_what_it_does():
    seconds = {"maps": (4.0, 4), "masks": (1.0, 80), "curves": (3.0, 6)}
    made = {"cell": {"encoder": "simclr", "weights": "trained", "source": "medium", "half": 1}, "seconds": seconds}
    expected = 40 + 10 * 200 / 80 + 3 * 12 * 7 / 6
    assert faithfulness.expected_seconds(made, Settings()) == pytest.approx(expected)


def test_a_shared_object_that_does_no_more_than_another_is_not_used():
    effects = torch.tensor([[0.2, 0.1, 0.1], [0.1, 0.1, 0.0], [0.0, 0.1, -0.2], [-0.1, -0.2, -0.3], [1e-7, 0, 0]])
    assert pairs.used(effects).tolist() == [True, False, False, True, False]


@pytest.fixture
def referees(monkeypatch, tmp_path):
    """Referees of which one uses scenes with even numbers of a chunk, the other the first three."""
    asked = []
    monkeypatch.setattr(pairs, "pictures", lambda data, name, half: textures())
    monkeypatch.setattr(pairs, "REFEREE_SIZE", 32)
    monkeypatch.setattr(pairs, "CHUNK", 4)

    def encoder(name, data):
        asked.append(name)
        return SimpleNamespace(fast=name)

    def effects(name, scenes):
        chunks = [pairs.scenes_of(None, "coco", 32, 1, 4, "hard", chunk).images for chunk in range(2)]
        numbers = [next(i for c in chunks for i, x in enumerate(c) if torch.equal(x, y)) for y in scenes.images]
        uses = [n % 2 == 0 if name == pairs.REFEREES[0] else n < 3 for n in numbers]
        return torch.tensor([[float(u), 0.5] for u in uses])

    monkeypatch.setattr(study, "encoder", encoder)
    monkeypatch.setattr(pairs, "removal_effects", effects)
    return asked


def test_scenes_that_can_be_solved_are_those_that_all_referees_use(referees, tmp_path):
    assert pairs.solvable(None, 1, 3, tmp_path) == [(0, 0), (0, 2), (1, 0)]
    assert json.loads((tmp_path / "solvable-1.json").read_text())["drawn"] == 8
    assert referees == [*pairs.REFEREES]
    assert pairs.solvable(None, 1, 4, tmp_path) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert referees == [*pairs.REFEREES]  # all were there already


def test_scenes_of_other_settings_are_looked_for_again(referees, tmp_path, monkeypatch):
    pairs.solvable(None, 1, 1, tmp_path)
    monkeypatch.setattr(pairs, "REFEREES", pairs.REFEREES[::-1])
    pairs.solvable(None, 1, 1, tmp_path)
    assert len(referees) == 4


def test_the_scenes_that_were_chosen_are_the_same_at_every_size(referees):
    chosen = [(0, 0), (0, 2), (1, 0)]
    small, large = (pairs.chosen_scenes(None, size, 1, chosen) for size in (32, 64))
    first = shared_object_scenes(*textures(), 3, size=32, difficulty="hard", seed=11)
    second = shared_object_scenes(*textures(), 1, size=32, difficulty="hard", seed=111)
    assert torch.equal(small.images, torch.cat([first.images[[0, 2]], second.images]))
    assert torch.equal(small.labels, large.labels)
    for one, other in ((small.objects, large.objects), (small.reference_objects, large.reference_objects)):
        cells = [  # which object is in which quarter
            torch.nn.functional.max_pool2d(x.float(), x.shape[2] // 2) for x in (one[:, None], other[:, None])
        ]
        assert torch.equal(*cells)
