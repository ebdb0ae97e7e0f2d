"""The network of masked diffusion against numpy, and who sees whom."""

import language
from language import compiled
from language import inputs
import numpy as np


def test_agrees_with_numpy():
  for segment in (language.SEGMENT, language.WHOLE):
    args = inputs("masked", segment)
    language.assert_agree(compiled("masked")(*args), language.Numpy("masked").masked, *args)


def test_its_modern_form_agrees_with_numpy():
  name, args = "masked, modern", inputs("masked")
  language.assert_agree(compiled(name)(*args), language.Numpy(name).masked, *args)


def test_a_new_network_returns_exactly_0_and_its_layers_their_input():
  language.assert_new_network_returns_0("masked")


def test_masked_sees_its_segment():
  for j in range(language.LENGTH):
    language.assert_moves(language.moved("masked", 0, j), language.same(j))


def test_gradients_reach_every_parameter_of_every_layer():
  language.assert_gradients_reach_every_layer("masked", remat=True)


def test_remat_does_not_change_the_value():
  value = np.mean((compiled("masked")(*inputs("masked")) - 1) ** 2)
  np.testing.assert_allclose(value, language.value_and_grad("masked", remat=True)[0], rtol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
  language.assert_bfloat16_in_and_float32_out("masked")
