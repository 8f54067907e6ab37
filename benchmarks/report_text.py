"""The words around the tables of report.py."""

TEXT = """# Which map can be trusted?

The score is the cosine of two embeddings. Does a map show where it comes from? This study asks that for {good} good
and {weak} weak encoders. This page has all results. [Measured](../../docs/measured.md) says what they mean for you.

## In short

Good encoders only. All columns are explained below.

* *Right object*: how often a map finds the object that two scenes share, in hard scenes that can be solved. Chance is
  0.25; untrained encoders are in brackets.
* *Faithfulness*: insertion less deletion with blur on the same scenes, less that of a random map.
* *Used object*: how often a map finds the object that the encoder uses, on the same scenes.
* *Medium scenes*: right object on easier scenes.
* *Photos*: rank accuracy in masks of objects.
* *Passes*: forward passes for a pair.

{summary}

Marks and names of methods are explained under [the table of hard scenes](#hard-scenes-that-can-be-solved).

## How it was made

Made by `{command}` (Python {python}, {packages}; CPU, one thread a process). All seeds are fixed in the code.
Settings: {settings}. All numbers by encoder, with their intervals, are in [results.csv](results.csv).
{missing}
The code: [study.py](../study.py) has encoders and methods, [pairs.py](../pairs.py) scenes and photos, and
[faithfulness.py](../faithfulness.py) metrics.

* **The score** is the cosine for every encoder, also for ProtoNets, which are trained with Euclidean distance.
* **{good} encoders are good**: they use the shared object in most medium scenes, at the size of images that they were
  trained with. The other {weak} are weak and have [a section of their own](#weak-encoders). Two of these, MobileNetV2
  and MobileNetV1, choose the hard scenes, so no result on hard scenes is about them.
* **Two halves of the pictures.** Results are on half 1, unless half 0 is named. No encoder was trained on half 1. But
  we looked at some of half 1 while we developed encoders, layers and metrics.
* **Means** give all encoders of a group the same weight. **Intervals** are 95 % bootstrap intervals of this mean.
  Pairs are drawn anew {resamples} times, the same for all encoders, because encoders share scenes and photos. If
  pairs are few, the percentiles are stretched as Student's interval is. An interval says how sure the mean over
  *these* encoders is. It does not say what another encoder would give, or what other random masks would give: all
  pairs share one set of masks.

## Hard scenes that can be solved

Each of the two scenes has four objects. They share one class: each scene shows another picture of it, in another
size. All objects have the colours of one palette (`shared_object_scenes(..., difficulty="hard")`, COCO objects).

In many such scenes, an encoder does not use the shared object (*used, hard, all* below). No map can show what the
encoder does not see. So two *referees*, MobileNetV2 and MobileNetV1, choose the scenes: a scene is kept if the
similarity of both falls most without the shared object. Kept of all scenes that were drawn: {kept}. The first {pairs}
are used. Two encoders that chose at chance would keep one of sixteen. The referees see the scenes at 224 pixels and
are in no table of them. Each encoder sees the same {pairs} pairs, at its own size.

* *Right object*: the mean of the map is larger on the shared object than on each other object. Chance is 0.25.
* *Over untrained*: right object, less that of the same encoders with random weights. This is what training taught the
  map to find.
* *Over shuffled*: right object, less that of the encoders with their own weights shuffled. Their batch norms take
  their statistics from scenes of the other half.
* *Where used*: right object among the pairs whose similarity, for this encoder, falls most if the shared object is
  removed. Only encoders with at least {least_used} such pairs count. To remove an object, we paint it with the
  background. The masks of RELAX and Distance Explainer do nearly the same, which favours them.
* *Where not used*: right object among all other pairs. A map that explains the score finds the shared object less
  often there. A map that looks for similar places need not.
* *Used object*: the map is largest on the object without which the similarity falls most, whichever that is.
* *Over swapped*: right object, less that of the map for a reference of another pair without the shared class.
* *Half 0*: right object on the other half of the pictures, for methods without masks.
* *All hard scenes*: right object before the referees chose.
* *Passes*: forward passes of one image that a pair costs, with its reference. They are counted in operations: a pass
  that starts at a layer counts by its part, and comparisons of places count, too. *With gradients* includes backward
  passes. *Once a call* comes in addition, once for any number of pairs; for example, the package tests how the tokens
  of an unknown transformer lie.

{main}

The methods:

* FAM cosine is also FAM with the dot product: the contributions differ by a factor, so the weights are the same.
* *self* is `contrast="self"`: what a match adds to what the image has with itself. For the decomposition, this is
  Grad-CAM with a gradient of its own for each place. The two differ only if a head treats places differently.
* Grad-CAM has signs here; the paper's has a ReLU.
* RELAX and Distance Explainer take {masks} masks of 7 x 7 cells. They paint with the mean colour instead of black,
  because black would be one more object. RELAX's paper takes 3,000 masks, Distance Explainer's class 1,000 of 8 x 8
  cells. Because of their cost, they see half of the pairs of untrained encoders and a quarter of the medium scenes;
  the larger EfficientNets see only 60 and 40 % of these. RELAX with {many:,} masks sees {faithful} pairs, without the
  larger EfficientNets.
* *integrated* is `IntegratedDecomposition` with a named layer. *best match* and *match less others* are
  `CorrespondenceMap`.
* *FAME* is `Fame`: the similar map, {descent} steps in pixels, on at most {descended} of the pairs of RELAX.
* *SharedParts* maps what each place contributes together with its own part in the reference. *FFAM* maps the parts of
  one image, weighed by the gradient. Their factorisation, by scikit-learn, is not counted in the passes.
* ¹ sees the map of the reference, not only its embedding. The two match maps look for similar places: they do not
  explain the score.
* ² sees other references and explains the difference to their mean: the next twelve references, or all. These are
  embedded *once a call*. *Over swapped* is a little unfair to these methods: for some pairs, the true reference is
  among the others.

![Right objects by method](scenes.png)

Which encoders are these? Others trained the EfficientNets, for another purpose. We trained the students on scenes of
this kind, and taught them to find the same places similar as EfficientNet does. The two match maps read just that. So
look at the EfficientNets first:

{kinds}

By encoder: how often it uses the shared object (chance 0.25; also untrained), and how often a map finds it in the
hard scenes that can be solved:

{by_encoder}

A control: the mean-colour encoder, whose embedding is the mean of the three colours. All objects have the same mean
colour, so all its similarities are equal, and most maps are rounding errors. Only *best match* has something to
compare: pixels. Right object:

{mean_colour}

![Examples of maps](maps.png)

*Medium scenes of the bundled encoder (clothing photos, CC0). The shared object is outlined. Signed maps are red and
blue.*

## Both images

Three questions about the same scenes. Is the strongest pair of places on the shared object in both images? Do the
places of the object in the image find it in the reference? Do those in the reference find it in the image? *Chance*
is a matrix without structure. Untrained encoders are in brackets.

{both}

## Faithfulness

Insertion less deletion of the cosine on the hard scenes, good encoders, {faithful} pairs each, {steps} steps. The
blur of the image or its mean colour hides places. All values are margins over a random map.

* *Both images*: each image is changed by its own map (`pair_insertion` less `pair_deletion`), for methods that make
  both maps.
* *Integrated over it*: the margin of the integrated map over this one, on the same encoders and pairs.
* *Outlines* are controls, drawn from what we know of the scenes. If a metric prefers the outline of all objects to
  that of the shared one, it does not ask which object is shared.
* RELAX with {many:,} masks did not see the two larger EfficientNets, because of its cost.

{faithfulness}

## Medium scenes

The shared object is the same picture in another view: mirrored, turned, resized, with another gamma
(`difficulty="medium"`). This favours methods that find the same picture again. Good encoders; methods with masks see
only trained ones:

{medium}

## Weak encoders

These {weak} encoders are small, or see the scenes at a size that they were not trained with. Medium scenes:

{weak_medium}

By encoder, right object on medium scenes:

{by_weak_encoder}

## A test over families

Is a method better than FAM cosine for all kinds of encoders? The values are right object on medium scenes, good and
weak encoders together. p comes from Wilcoxon's signed-rank test of the mean differences to FAM cosine of {families}
families of encoders. It is adjusted for the number of methods (Benjamini and Yekutieli); before that, it cannot be
smaller than {least_p}. The good encoders are one family, so they cannot be tested alone.

{family_tests}

## Photos

{photos} COCO photos. Each has a reference that shares a category, and objects of the shared categories cover 3 to 50
%. What the encoder sees in common need not be the annotated objects. Photographers put their subject in the middle,
so compare with the blob.

{photo_places}

## Goals

We set these goals for hard scenes, good encoders and half 1. The judged map is the one with the largest share of
right objects on half 0, among the maps that need at most three forward passes, and at most 0.05 more to compare
places. There is one judged map among those that see one reference only. If a map that sees others is better, it is
judged, too. Not in the choice are RELAX and Distance Explainer, and SharedParts and FFAM, whose factorisation is not
counted. Shares are judged by their mean, not by the end of their interval. *On the same pairs*: the judged map less
the other.

{goals}

The same, chosen and judged only on the three EfficientNets, which others trained for another purpose:

{goals_of_others}

## What to object to

* Two encoders chose the hard scenes. Like the EfficientNets, they are convolutional and were trained on ImageNet. So
  the EfficientNets see what the referees see more often than another encoder would. *All hard scenes* shows all
  scenes.
* A scene is kept if painting over its shared object matters to the referees. Maps by masks paint, too. So the choice
  favours these maps, if any.
* The vision transformers and the bundled encoder contain EfficientNet-Lite0's first layers and were distilled from
  it. So the good encoders are not independent of each other. The test over families counts them as one.
* These encoders were trained on two scenes of four pieces of which one is shared, as here. They were also trained to
  find the same places similar as EfficientNet does, and *best match* reads that. Their photos were those of half 0,
  so *half 0* is not new to them; half 1 is.
* Half 1 is new to all encoders, but not to us: we had seen some of it when we chose encoders, layers and methods.
* The share of right objects does not ask whether the map explains the encoder. If the encoder looks elsewhere, a
  faithful map counts as wrong. *Where not used* and *used object* ask that question.
* The palette, the plain background and the outlines cut by hand are not natural.
* TensorFlow's padding shifts the maps of MobileNets and EfficientNets by up to half a cell against the image. We did
  not correct this.
* Weak encoders see scenes at another size than that of their training (MobileNets 128 pixels, CIFAR encoders 64).
* The explanation of an untrained encoder need not show the shared object: *over untrained* tests encoder and map
  together. Each encoder has one draw of random weights.
* Insertion and deletion show pictures that no encoder was trained on. They take few pairs, since each costs a
  thousand passes.
* *residual 0.9* was tried among other shares on half 0, with weak encoders, and was not the best there
  ([weightings.md](weightings.md)). The layers, the steps and the number of other images were chosen there, too.
"""
