"""The next-token network against numpy, as a denoiser of two streams, plain, and with a cache."""

import re

import jax
import language
from language import C_NOISE
from language import compiled
from language import inputs
from language import jitted
from language import LENGTH
from language import MODELS
from language import NOISY
from language import params
from language import SEGMENT
from language import TOKENS
from language import value_and_grad
from language import WHOLE
import numpy as np


def test_agrees_with_numpy():
  for segment in (SEGMENT, WHOLE):
    args = inputs("causal", segment)
    language.assert_agree(compiled("causal")(*args), language.Numpy("causal").causal_lm, *args)


def test_next_token_agrees_with_numpy():
  language.assert_agree(compiled("causal", "next_token")(TOKENS, SEGMENT),
                        language.Numpy("causal").next_token, TOKENS, SEGMENT)


def test_a_new_network_returns_exactly_0_and_its_layers_their_input():
  language.assert_new_network_returns_0("causal")


def test_a_stream_sees_what_it_may():
  language.assert_streams_see_what_they_may("causal")


def test_next_token_sees_the_tokens_before_it_of_its_segment():
  for j in range(LENGTH):
    distance = language.moved("causal", 0, j, "next_token", (TOKENS, SEGMENT))
    language.assert_moves(distance, language.same(j) & (np.arange(LENGTH) > j))


def test_cached_generation_equals_the_whole():
  language.assert_cached_generation_equals_the_whole("causal")


def test_cached_generation_of_the_plain_network_equals_the_whole():
  expected = compiled("causal", "next_token")(TOKENS, WHOLE)
  cache, token = MODELS["causal"].empty_cache(2, LENGTH), np.full(2, language.VOCABULARY)
  query = compiled("causal", "query_next")
  for i in range(LENGTH):
    ours, cache = query(token, cache, i)
    np.testing.assert_allclose(ours, expected[:, i], rtol=0, atol=1e-5)
    token = TOKENS[:, i]


def test_without_its_noise_the_noisy_stream_is_the_plain_network():
  silent = {k: jax.tree.map(np.zeros_like, v) if k in ("noisy_embedding", "level") else v
            for k, v in params("causal")["params"].items()}
  np.testing.assert_allclose(
      jitted("causal")({"params": silent}, *inputs("causal")),
      compiled("causal", "next_token")(TOKENS, SEGMENT), rtol=0, atol=1e-5)


def test_one_level_for_a_sequence_may_be_given_once():
  once = C_NOISE[:, :1]
  np.testing.assert_allclose(
      compiled("causal")(TOKENS, NOISY, once, SEGMENT),
      compiled("causal")(TOKENS, NOISY, np.tile(once, LENGTH), SEGMENT), rtol=0, atol=1e-5)


def test_no_scores_of_both_streams():
  args = [np.tile(a[:1], (1, 7, 1)[:a.ndim]) for a in inputs("causal")]
  program = str(jax.make_jaxpr(MODELS["causal"].apply)(params("causal"), *args))
  assert "49,49" in program and not re.search(r"\[[\d,]*\b98\b", program)


def test_gradients_reach_every_parameter_of_every_layer():
  language.assert_gradients_reach_every_layer("causal")


def test_remat_and_unroll_change_neither_value_nor_gradient():
  (value, grad), (value_, grad_) = (value_and_grad("causal", **options) for options in
                                    ({}, dict(remat=True, unroll=3)))
  np.testing.assert_allclose(value, value_, rtol=1e-6)
  for g, g_ in zip(jax.tree.leaves(grad), jax.tree.leaves(grad_)):
    np.testing.assert_allclose(g, g_, rtol=0, atol=1e-5 * np.abs(g).max())


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
  language.assert_bfloat16_in_and_float32_out("causal")
