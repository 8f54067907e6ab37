"""The words around the tables of report.py."""

TEXT = """# Which map can be trusted?

Made by `{command}` (Python {python}, {packages}; CPU, one thread a process). All seeds are fixed in the code.
Settings: {settings}. All numbers by encoder, with their intervals: [results.csv](results.csv).
{missing}
What is compared, and how: [study.py](../study.py) (encoders, methods), [pairs.py](../pairs.py) (scenes and photos),
[faithfulness.py](../faithfulness.py) (metrics). The score is the cosine of the embeddings for every encoder, also for
ProtoNets, which are trained with Euclidean distance. {good} encoders are good enough to be asked: they use the shared
object in most medium scenes, at the size of images that they were trained with. {weak} are not, and stand apart; two of
them, MobileNetV2 and MobileNetV1, choose the hard scenes and so cannot be asked about these. The half of the pictures
is half 1 where nothing else is said. No encoder was trained on half 1, but half 1 was looked at while encoders, layers
and metrics were developed.

Encoders of a group count the same. Intervals are 95 % bootstrap intervals of the mean over the encoders of the group;
pairs are drawn anew ({resamples} times), the same for all encoders, because encoders share scenes and photos. Where
pairs are few, the percentiles are stretched as Student's interval is. Intervals say how sure the mean over *these*
encoders is, not what another encoder would give, and not what other masks would give: all pairs share one set.

## Goals

Hard scenes, good encoders, half 1. Judged is the map with the largest share of right objects on half 0, among those
that need at most three forward passes (and what comparing places costs, at most 0.05): one of those that see one
reference only, and, if another is better, one of all. RELAX and Distance Explainer have no part in the choice, nor have
SharedParts and FFAM, whose factorisation is not counted. Shares are judged by their mean, not by the end of their
interval. *On the same pairs*: the judged map less the other.

{goals}

The same, chosen and judged on the three EfficientNets alone, which others trained and for another purpose:

{goals_of_others}

## In short

Good encoders. *Right object* (chance 0.25; untrained encoders in brackets) on hard scenes that can be solved,
*faithfulness* (insertion less deletion with blur, over a random map) and *used object* on the same, right object on
*medium scenes*, rank accuracy in masks of objects in *photos*; forward *passes* for a pair. All are explained below.

{summary}

## Hard scenes that can be solved

Two scenes of four objects share a class: another picture of it, of another size, all objects in one palette
(`shared_object_scenes(..., difficulty="hard")`, COCO objects). Encoders use the shared object in a part of all such
scenes only (*used, hard, all* below), and a map cannot show what the encoder does not see. So these are the scenes in
which two *referees*, MobileNetV2 and MobileNetV1, both lose more of the similarity with the shared object than with any
other. Kept of the scenes that were drawn: {kept}, of which the first {pairs} are used; two encoders that chose at
chance would keep a sixteenth. Referees are in no table of these scenes, and see them at 224 pixels. {pairs} pairs for
each encoder: the same pictures in the same cells at each encoder's size.

* *Right object*: the mean of the map on the shared object is larger than on each other object; chance is 0.25.
* *Over untrained*: less the same map on the same encoders with random weights: what training has taught the map to
  find. *Over shuffled*: less the encoders with their own weights shuffled. Their batch norms take their statistics from
  scenes of the other half.
* *Where used*: among pairs where taking away the shared object lowers the encoder's own similarity more than taking
  away any other (encoders with at least {least_used} such pairs). Taking away paints with the background, as the masks
  of RELAX and Distance Explainer nearly do, which is in their favour. *Where not used*: the other pairs; a map that
  explains the score finds the shared object less often there, a map that looks for like places need not.
* *Used object*: the map is largest on the object whose absence lowers the similarity most, whichever that is.
* *Over swapped*: less the map for a reference of another pair without the shared class.
* *Half 0*: the other half of the pictures, for methods without masks. *All hard scenes*: before the referees chose.
* *Passes*: forward passes of one image that a pair costs, with its reference, counted in operations, so that a pass
  from a layer on counts by its part, and comparisons of places count, too. *With gradients*: with those of backward
  passes. *Once a call*: for any number of pairs, as the package asks an unknown transformer how its tokens lie. All are
  means over these encoders.

{main}

The EfficientNets, which others trained, and the students, which were trained here on scenes of this kind, to have the
EfficientNet's likeness of places: the two match maps read just that, so look at the left half first.

{kinds}

![Right objects by method](scenes.png)

FAM cosine stands for FAM with the dot product too: the contributions differ by a factor, so the weights are the same.
*self*: `contrast="self"`, what a match has beyond what the image has with itself; for the decomposition it is Grad-CAM
by place, so the two differ only where a head treats places differently. Grad-CAM is signed here (the paper's has a
ReLU). RELAX and Distance Explainer take {masks} masks of 7 x 7 cells and paint with the mean colour instead of black,
because black would be one more object. RELAX's paper takes 3,000, Distance Explainer's class 1,000 of 8 x 8 cells. For
their cost they see half of the pairs of untrained encoders, a quarter of those of medium scenes, and of the larger
EfficientNets 60 and 40 % of these. RELAX with {many:,} masks sees {faithful} pairs, and not the larger EfficientNets.
*integrated*: `IntegratedDecomposition`, its layer named. *best match* and *match less others*: `CorrespondenceMap`.
*FAME*: `Fame`, the similar map, {descent} steps in pixels, on at most {descended} of the pairs of RELAX.
*SharedParts*: what each place contributes with its own part in the reference. *FFAM*: the parts of one image, by the
gradient. Their factorisation, by scikit-learn, is not among the passes.
¹ sees the reference's map, not only its embedding. The match maps look for like places: they do not explain the score.
² sees other references and explains the difference to their mean: the next twelve, or all. They are embedded *once a
call*. The control *over swapped* is a little unfair to these: the true reference is among the others of some pairs.

By encoder: how often it uses the shared object (chance 0.25; also untrained), and how often a map finds it in the hard
scenes that can be solved:

{by_encoder}

The mean-colour encoder (embedding: the mean of the three colours), right object; all objects have one mean colour, so
its similarities are all equal and its maps rounding, and what is left is best match's comparison of pixels:

{mean_colour}

![Examples of maps](maps.png)

*Medium scenes of the bundled encoder (clothing photos, CC0); the shared object is outlined. Signed maps are red and
blue.*

## Both images

The same scenes, asked of both images: is the strongest pair of places on the shared object in both; do the places of
the object in the image find it in the reference, and the other way round? *Chance*: a matrix without structure.
Untrained encoders in brackets.

{both}

## Faithfulness

Insertion less deletion of the cosine on the hard scenes, good encoders, {faithful} pairs each, {steps} steps; what
hides is the image's blur or its mean colour. Margins over a random map; *both images*: each image changed by its own
map (`pair_insertion` less `pair_deletion`), for methods that have both. *Integrated over it*: the margin of the
integrated map over this one, of the same encoders and pairs. RELAX with {many:,} masks was left out for the two larger
EfficientNets, for its cost. The *outlines* are controls, drawn from what is known of the scenes: a metric that prefers
the outline of all objects to that of the shared one does not ask which object is shared.

{faithfulness}

## Medium scenes

The shared object is the same picture in another view: mirrored, turned, resized, other gamma (`difficulty="medium"`).
They favour methods that find the same picture again. Good encoders; masks of trained ones only:

{medium}

## Weak encoders

{weak} encoders that are small, or see these scenes at a size that is not theirs. Medium scenes:

{weak_medium}

By encoder, right object on medium scenes:

{by_weak_encoder}

## A test over families

Right object on medium scenes, good and weak encoders together. p: Wilcoxon's signed-rank test of the mean differences
to FAM cosine of {families} families of encoders, adjusted for the number of methods (Benjamini and Yekutieli); before
that it cannot be smaller than {least_p}. The good encoders are one family, so there is no such test of them.

{family_tests}

## Photos

{photos} COCO photos, each with a reference that shares a category, objects of the shared categories covering 3 to 50 %.
What the encoder sees in common need not be the annotated objects, and photographers put their subject in the middle:
compare with the blob.

{photo_places}

## What to object to

* Two encoders chose the hard scenes. They are convolutional and were trained on ImageNet, as the EfficientNets were, so
  these see what the referees see more often than another encoder would. *All hard scenes* has the others.
* A scene is kept because painting over its shared object matters to the referees. So a map by masks, which paints, is
  favoured, if at all.
* The vision transformers and the bundled encoder stand on EfficientNet-Lite0's first layers and were distilled from it,
  so the good encoders are fewer witnesses than their number; they count as one family in the test below.
* They were trained on two scenes of four pieces, of which one is shared, as here, and to have its likeness of places,
  which *best match* reads. Photos were those of half 0, so *half 0* is not new to them; half 1 is.
* Half 1 is new to all encoders, but not to those who chose encoders, layers and methods: some of it was looked at.
* The share of right objects does not ask whether the map explains the encoder: where the encoder looks elsewhere, a
  faithful map is wrong. *Where not used* and *used object* ask that.
* The palette, the plain background and outlines cut by hand are not natural.
* TensorFlow's padding shifts the maps of MobileNets and EfficientNets by up to half a cell against the image; it was
  not corrected.
* Weak encoders see scenes at a size other than that of their training (MobileNets 128 pixels, CIFAR encoders 64).
* An untrained encoder's explanation need not show the shared object: *over untrained* tests encoder and map together.
  One draw of random weights for each encoder.
* Insertion and deletion show pictures that no encoder was trained on; few pairs, since each costs a thousand passes.
* *residual 0.9* was tried among other shares on half 0, with weak encoders, and was not the best there:
  [weightings.md](weightings.md). The layers, steps and the number of other images were chosen there.
"""
