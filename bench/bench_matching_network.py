"""Races of whole layers: ``fastmeta.nn`` against ``fastmeta.reference`` and easyfsl, all three with the same weights.

The configuration is easyfsl's (only the support normalised, K = S, log(p + 1e-6)), so that all compute the same. The reference is
written to be read: it goes through the episodes one by one.
"""

import easyfsl.methods
import fastmeta.nn
import fastmeta.reference
import torch
from race import Absent, Entry, Race

SHAPES = [(1, 75, 5, 64, 5), (1, 75, 25, 64, 5), (16, 75, 25, 64, 5)]
OPERATIONS = {"SupportEncoder": (), "QueryEncoder": (), "MatchingNetwork with FCE": ("easyfsl",), "MatchingNetwork": ()}  # further peers


def easyfsl_layer(D):
    return easyfsl.methods.MatchingNetworks(feature_dimension=D)


def weights(D):
    """One random start, under the names of easyfsl and under ours."""
    torch.manual_seed(0)
    theirs = easyfsl_layer(D).state_dict()
    names = {"support_features_encoder.": "support_encoder.lstm.", "query_features_encoding_cell.": "query_encoder.cell."}
    ours = {new + key.removeprefix(old): w for key, w in theirs.items() for old, new in names.items() if key.startswith(old)}
    return theirs, ours


def build(operation, shape, peer, dtype):
    B, Q, S, D, C = shape
    generator = torch.Generator().manual_seed(0)
    # Halved: the dot-product attention inside f saturates on N(0, 1) features, and 25 steps of near-ties make some gradients so
    # ill-conditioned that rounding alone, also the reference's, comes near the tolerance.
    query, support = (0.5 * torch.randn(B, n, D, generator=generator).to(dtype) for n in (Q, S))
    labels = torch.rand(B, S, generator=generator).argsort(-1) % C
    theirs, ours = weights(D)

    if peer == "easyfsl":
        if B > 1:
            raise Absent("easyfsl takes one episode at a time")
        layer = easyfsl_layer(D)
        layer.load_state_dict(theirs)

        def one_episode(s, q):
            layer.process_support_set(s[0], labels[0])
            return layer(q[0]).unsqueeze(0)

        return Entry(one_episode, (support, query), tuple(layer.parameters()))

    room = fastmeta.nn if peer == "fastmeta" else fastmeta.reference
    fce = operation != "MatchingNetwork"
    network = room.MatchingNetwork(feature_dim=D, fce=fce, normalize="support", probability_eps=1e-6)
    if fce:
        network.load_state_dict(ours)
    network.to(dtype)
    if operation == "SupportEncoder":
        return Entry(network.support_encoder, (support,), tuple(network.support_encoder.parameters()))
    if operation == "QueryEncoder":
        return Entry(network.query_encoder, (query, support), tuple(network.query_encoder.parameters()))
    return Entry(lambda s, q: network(s, labels, q, num_classes=C), (support, query), tuple(network.parameters()))


def truth(peer):
    return "reference"


RACES = [Race(operation, "BQSDC", shape, backward, ("fastmeta", "reference", *others), build, truth,
              size=shape[0] * shape[1] * shape[2] * 12 * shape[3] ** 2)  # K = S steps of f, a 3D x 4D product for every query
         for operation, others in OPERATIONS.items() for shape in SHAPES for backward in (False, True)]


def test_race(enter, race, peer):
    enter(race, peer)
