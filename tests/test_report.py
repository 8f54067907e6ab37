"""What a call tells the user at its end."""

import pytest
import torch
from encoders import HeadEncoder, random, seeded

from captum_fam import FeatureActivationMap
from captum_fam.engine.report import Dependence, Report


@pytest.mark.parametrize(
    ("other", "advice"),
    [("blocks.3.norm1", "such as 'blocks.3.norm1'."), (None, "such as the normalisation at its input.")],
)
def test_a_layer_off_the_map_is_an_error_that_names_another(other, advice):
    report = Report()
    report.note_dependence((0, "blocks.11.norm2"), Dependence.OFF_THE_MAP, lambda: other)
    with pytest.raises(ValueError, match=r"layer blocks\.11\.norm2 only through tokens") as raised:
        report.texts()
    assert str(raised.value).endswith(f"choose a layer before the last attention, {advice}")


def test_one_call_tells_what_its_passes_found_each_thing_once():
    one, other = Report(), Report()
    for report, row in ((one, 0), (other, 2)):
        report.warnings.append("of both")
        report.note_unusable("inputs", torch.arange(3) == row, first=4)
    other.warnings.append("of one")
    other.note_dependence((0, "conv1"), Dependence.NONE, lambda: None)
    one.include(other)
    both, of_one, unusable, cut = one.texts()
    assert (both, of_one) == ("of both", "of one")
    assert unusable.startswith("Embeddings are zero or not finite (inputs [4, 6]): the maps")
    assert cut.startswith("The embedding does not depend on layer conv1, or")


def test_layers_explained_one_by_one_tell_which_references_are_zero():
    encoder = seeded(HeadEncoder)
    fam = FeatureActivationMap(encoder, [encoder.conv2, encoder.layer], n_steps=2)
    references = torch.cat([random(1, 4), torch.zeros(1, 4)])
    with pytest.warns(UserWarning, match=r"zero or not finite \(references \[1\]\)") as warned:
        fam.attribute_all(random(2, 3, 8, 8), reference_embedding=references)
    assert len(warned) == 1
