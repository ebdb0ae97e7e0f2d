"""Classification of Tiny ImageNet (64 x 64) by a ViT of 12 layers, as two blocks of six.

TFDS has no such data set: it is made of tiny-imagenet-200.zip, which you download and unpack.

    cd tiny-imagenet-200                                                # SPLIT/CLASS/*.JPEG
    for c in train/*; do mv $c/images/* $c; done
    while read file c box; do mkdir -p val/$c; mv val/images/$file val/$c; done \
        < val/val_annotations.txt
    rm -r val/images test                                               # it has no labels
    cd ..
    python -m dbjax.prepare --what=folder --source=tiny-imagenet-200 --name=tiny_imagenet
    python -m dbjax.main --config=configs/tiny_imagenet.py --workdir=DIR    # two blocks
    python -m dbjax.main --config=configs/tiny_imagenet.py --workdir=DIR2 \
        --config.task.end_to_end=True                                   # an ordinary ViT
    python -m dbjax.evaluate --workdir=DIR                              # accuracy

As configs/cifar100.py, with patches of 8 x 8, for an accelerator. The paper's accuracy (arXiv
2506.14202): 36.16%, end to end 35.32% (the paper's figures; not trained by us). The number of
epochs, weight decay and clipping are ours. configs/tiny_imagenet.py:small runs on a CPU, in
minutes, to see that it does; it learns little.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      num_blocks=2,
      task=dict(name="classify", crop=4, flip=True, rand_augment=2),
      data=dict(name="tiny_imagenet", image_size=64, num_classes=200, held_out="val", workers=4),
      model=dict(num_layers=12, width=128, num_heads=4, patch_size=8, dropout=0.1),
      optimizer=dict(learning_rate=0.0005, warmup_steps=7812),
      train=dict(num_steps=390_625, batch_size=128),
      checkpoint=dict(every_steps=5000),
      sample=dict(num_steps=4, batch_size=500), evaluate=dict(num_samples=10_000),
  ))


VARIANTS = dict(small=dict(
    data=dict(workers=0),
    model=dict(num_layers=4, width=64, num_heads=2),
    optimizer=dict(learning_rate=0.001, warmup_steps=20),
    train=dict(num_steps=300, batch_size=32),
    checkpoint=dict(every_steps=100), log=dict(every_steps=20), evaluate=dict(num_samples=1000),
))
