"""Another modality: signals in time. An own task, its data, network and config, in one file.

    cd configs/examples                                          # where signals:... is found
    python -m dbjax.main     --config=signals.py --workdir=/tmp/signals
    python -m dbjax.sample   --workdir=/tmp/signals --out=/tmp/signals.npz           # and .png
    python -m dbjax.evaluate --workdir=/tmp/signals

Takes 65 s of CPU time. Spectra: tones 5.1 (training's: 1.3), chirps 6.0 (0.7), chords 10.8 (2.6).
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import dbjax

KINDS = np.array(["tone", "chirp", "chord"])


def load(config):
  """2,000 signals to train on, 500 held out: signal (n, length) float32, label (n,) int32."""
  rng, t = np.random.default_rng(0), np.arange(config.data.length) / config.data.length
  cycles, (p, q) = rng.uniform(2, 5, (2500, 1)) * t, rng.uniform(0, 1, (2, 2500, 1))
  sine = lambda x: np.sin(2 * np.pi * x)
  tone, chirp, high = sine(cycles + p), sine(cycles + 4 * t**2 + p), sine(2.5 * cycles + q)
  label = rng.integers(0, len(KINDS), 2500, np.int32)
  signal = np.choose(label[:, None], [tone, chirp, (tone + high) / 2**0.5]).astype(np.float32)
  return [dbjax.Arrays(signal=signal[i], label=label[i]) for i in (slice(2000), slice(2000, None))]


class Net(nn.Module):
  num_layers: int  # of the block
  width: int = 32

  @nn.compact
  def __call__(self, x, c_noise, label):  # (N, length), (N,), (N,) -> (N, length)
    angles = c_noise[:, None] * jnp.geomspace(1, 100, 64)
    c = nn.Embed(len(KINDS), self.width)(label) + nn.Dense(self.width)(jnp.sin(angles))
    h = nn.Conv(self.width, (17,))(x[..., None])
    for _ in range(self.num_layers):
      inside = nn.Conv(self.width, (17,))(nn.LayerNorm()(h) + c[:, None])
      h += nn.Conv(self.width, (17,))(nn.silu(inside))
    return nn.Dense(1)(h)[..., 0]


class SignalsTask(dbjax.Task):
  FIELDS = {**dbjax.GAUSSIAN_FIELDS, "data.length": dbjax.Field(64, "of a signal")}

  def abstract_batch(self, num):
    return dict(signal=jax.ShapeDtypeStruct((num, self.config.data.length), jnp.float32),
                label=jax.ShapeDtypeStruct((num,), jnp.int32))

  def call(self, num):
    x, label = self.abstract_batch(num).values()
    return dbjax.Call((x, jax.ShapeDtypeStruct((num,), jnp.float32), label), x.shape)

  def draw(self, key, batch, interval):
    sigma_key, noise_key = jax.random.split(key)
    y, sigma = batch["signal"], dbjax.sample_sigma(sigma_key, batch["label"].shape, interval)
    z = y + sigma[:, None] * jax.random.normal(noise_key, y.shape)
    return dict(y=y, z=z, sigma=sigma, label=batch["label"])

  def loss(self, params, drawn, frozen=None):
    d = self.denoise(params, frozen, drawn["z"], drawn["sigma"], drawn["label"])
    weight = dbjax.edm_weight(drawn["sigma"], self.config.sigma_data)[:, None]
    return jnp.mean(weight * (d - drawn["y"]) ** 2)

  def denoise(self, params, frozen, z, sigma, label):
    return dbjax.denoise(lambda *x: self.apply(params, *x, label), z, sigma, self.config.sigma_data)

  def generate(self, model, index, seed, options):
    label = (index % len(KINDS)).astype(np.int32)
    return np.asarray(model.solve(model.start(seed, index), options, label)), label

  def save(self, model, samples, labels, path):
    pictures = dbjax.pictures.curves(samples)
    return dbjax.pictures.save_grid(path.with_name(f"{path.name}.png"), pictures, KINDS[labels], 10)

  def evaluate(self, model, dataset, options):
    """From a spectrum to the nearest held-out one and back: of those drawn, of training's."""
    drawn = dict(zip(["signal", "label"], model.sample(options["num_samples"])))
    train, rest = dataset.train, dataset.held_out
    sets = drawn, train.take(np.arange(len(drawn["label"]))), rest.take(np.arange(len(rest)))
    rows = []
    for k, kind in enumerate(KINDS):
      *ours, held_out = [np.abs(np.fft.rfft(x["signal"][x["label"] == k])) for x in sets]
      apart = [np.linalg.norm(x[:, None] - held_out, axis=-1) for x in ours]
      near = [float(d.min(0).mean() + d.min(1).mean()) / 2 for d in apart]
      rows.append(dict(kind=str(kind), drawn=near[0], training=near[1]))
    return dict(spectra=rows)


def get_config():
  return ml_collections.ConfigDict(dict(
      task=dict(name="signals:SignalsTask"), data=dict(name="signals:load"), sigma_data=0.7,
      model=dict(network="signals:Net", num_layers=6), sample=dict(solver="heun", num_steps=25),
      optimizer=dict(learning_rate=0.004), train=dict(num_steps=400, ema_decay=0.99)))
