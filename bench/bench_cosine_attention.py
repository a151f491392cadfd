"""Races of ``fastmeta.functional``: ``matching_log_probs`` and ``cosine_attention`` against what one would write without them.

* eager: ``F.normalize`` both sides, product, softmax, product with the one-hot labels (or the values), logarithm.
* SDPA: ``scaled_dot_product_attention`` on normalised inputs, with the same values.
* compile: ``torch.compile`` of eager.
* easyfsl: ``easyfsl.methods.MatchingNetworks`` without its encoders; one episode, and only the support is divided by its norm.
* floor: the two products alone. Not a peer: what is left when everything else costs nothing.

On the CPU, and where there is a GPU on it too, as CUDA graphs. What the GPU kernels cost without one: ``python bench/gpu_costs.py``.

The one-hot labels of the peers are made beforehand and not timed (easyfsl makes its own); fastmeta gets the integers.
"""

import easyfsl.methods
import torch
import torch.nn.functional as F
from fastmeta.functional import cosine_attention, matching_log_probs
from race import Absent, Entry, Race

# (B, Q, S, D, C): how many times faster than the best peer we have to be, forward and forward+backward (None: nobody promised).
MATCHING_MARKS = {
    (1, 75, 5, 64, 5): (6, 4),
    (1, 75, 25, 64, 5): (5, 4),
    (32, 75, 25, 64, 5): (2.5, 2.5),
    (32, 75, 25, 1600, 5): (2, 2),
    (16, 300, 100, 512, 20): (1.4, 1.5),
    (1, 128, 65536, 64, 64): (1.7, 2),
    (1, 1024, 16384, 128, 1000): (4, 3),
    (1, 16, 1_000_000, 64, 64): (None, None),
}
ATTENTION_SHAPES = [(1, 75, 25, 64, 64), (32, 75, 25, 64, 64), (16, 300, 100, 512, 512), (1, 128, 65536, 64, 64)]


def eager(query, support, values):
    return (F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).mT).softmax(-1) @ values


def eager_support_only(query, support, values):
    return (query @ F.normalize(support, dim=-1).mT).softmax(-1) @ values


def sdpa(query, support, values):
    query, support, values = (x.unsqueeze(1) for x in (F.normalize(query, dim=-1), F.normalize(support, dim=-1), values))
    return F.scaled_dot_product_attention(query, support, values, scale=1.0).squeeze(1)


def products(query, support, values):
    return (query @ support.mT) @ values


WITHOUT_FASTMETA = {"eager": eager, "SDPA": sdpa, "compile": eager, "floor": products}


def compiled(function, peer):
    return torch.compile(function, dynamic=False, fullgraph=True) if peer == "compile" else function


class EasyfslHead(easyfsl.methods.MatchingNetworks):
    """What easyfsl does behind its encoders."""

    def encode_support_features(self, support_features):
        return support_features

    def encode_query_features(self, query_features):
        return query_features


def features(shape, dtype):
    B, Q, S, D, _ = shape
    generator = torch.Generator().manual_seed(0)
    query, support = (torch.randn(B, n, D, generator=generator, device="cpu") for n in (Q, S))
    device = torch.get_default_device()
    return query.to(device, dtype), support.to(device, dtype), generator


def build_matching(operation, shape, peer, dtype):
    B, _, S, D, C = shape
    query, support, generator = features(shape, dtype)
    labels = (torch.rand(B, S, generator=generator, device="cpu").argsort(-1) % C).to(query.device)  # every class has its share, in any order

    if peer == "fastmeta":
        return Entry(lambda q, s: matching_log_probs(q, s, labels, C), (query, support))
    if peer == "easyfsl":
        if B > 1:
            raise Absent("easyfsl takes one episode at a time")
        head = EasyfslHead(feature_dimension=D)

        def one_episode(q, s):
            head.process_support_set(s[0], labels[0])
            return head(q[0]).unsqueeze(0)

        return Entry(one_episode, (query, support))

    one_hot = F.one_hot(labels, C).to(dtype)
    if peer == "easyfsl in float64":
        return Entry(lambda q, s: (eager_support_only(q, s, one_hot) + 1e-6).log(), (query, support))
    if peer == "floor":
        return Entry(lambda q, s: products(q, s, one_hot), (query, support))
    readout = compiled(lambda q, s: WITHOUT_FASTMETA[peer](q, s, one_hot).log(), peer)
    return Entry(readout, (query, support))


def build_attention(operation, shape, peer, dtype):
    B, _, S, _, C = shape
    query, support, generator = features(shape, dtype)
    values = torch.randn(B, S, C, generator=generator, device="cpu").to(query)
    function = cosine_attention if peer == "fastmeta" else compiled(WITHOUT_FASTMETA[peer], peer)
    return Entry(function, (query, support, values))


def truth(peer):
    return {"floor": "floor", "easyfsl": "easyfsl in float64"}.get(peer, "eager")


def race(operation, shape, backward, mark, build, device, *extra_peers):
    B, Q, S, D, C = shape
    return Race(operation, "BQSDC", shape, backward, ("fastmeta", "eager", "SDPA", "compile", *extra_peers, "floor"), build, truth,
                size=B * Q * S * (D + C), mark=mark if device == "cpu" else None, device=device)


RACES = []
for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
    RACES += [race("matching_log_probs", shape, backward, mark, build_matching, device, "easyfsl")
              for shape, marks in MATCHING_MARKS.items() for backward, mark in zip((False, True), marks)]
    RACES += [race("cosine_attention", shape, backward, None, build_attention, device) for shape in ATTENTION_SHAPES for backward in (False, True)]


def test_race(enter, race, peer):
    enter(race, peer)
