"""The command line: ``fastmeta demo | train | evaluate | info | bench-report``. What the user can put right is one line and status 2."""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    from . import __version__, data
    from .reference.cosine_attention import NORMALIZE
    from .training.matching import ENCODERS, LAYERS, PRECISIONS, MatchingConfig

    parser = argparse.ArgumentParser(prog="fastmeta", description="Fused kernels for meta-learning layers: demo, training, evaluation.")
    parser.add_argument("--version", action="version", version=f"fastmeta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train on characters drawn here, test on unseen ones, time the layers, draw a picture")
    demo.add_argument("--out", type=Path, default=Path("fastmeta-demo.png"), metavar="PNG", help="the picture (default: %(default)s)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a model")
    models = train.add_subparsers(dest="model", required=True, metavar="MODEL")
    matching = models.add_parser("matching", help="a Matching Network (Vinyals et al., 2016)")
    matching.set_defaults(run=_train)
    defaults = {field.name: field.default for field in fields(MatchingConfig)}

    def setting(name: str, text: str, **how) -> None:
        # Only what was given is in the result: --resume takes the rest from the checkpoint.
        if isinstance(defaults[name], bool):
            how["action"] = argparse.BooleanOptionalAction
        shown = how.pop("shown", defaults[name])
        matching.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=f"{text} (default: {shown})", **how)

    setting("way", "classes of a training episode", type=int)
    setting("shot", "supports of each class", type=int)
    setting("queries", "queries of each class", type=int)
    setting("episodes_per_batch", "episodes of one update", type=int)
    setting("steps", "updates; the learning rate falls to 0 along half a cosine", type=int)
    setting("lr", "learning rate of Adam at the start", type=float)
    setting("seed", "decides the weights and the episodes", type=_seed)
    setting("encoder", "the embedding", choices=tuple(ENCODERS))
    setting("channels", "of the embedding", type=int)
    setting("fce", "full context embeddings")
    setting("fce_steps", "attention steps of the full context embedding", type=int, shown="as many as supports")
    setting("scale", "factor on the cosine; the paper has 1", type=float)
    setting("learn_scale", "learn the factor from that start")
    setting("normalize", "what the similarity divides by its norm", choices=NORMALIZE)
    setting("data", "the data set", choices=data.SETS)
    setting("rotations", "train also on the classes turned by 90, 180, 270 degrees", shown="for omniglot")
    setting("distortion", "strength of the small random distortions of the training images", type=float)
    setting("validation_classes", "training classes to hold out", type=int)
    setting("eval_every", "updates between evaluations on the held-out classes, 0 for none", type=int)
    setting("precision", "of the embedding while it trains", choices=PRECISIONS)
    setting("layers", "the implementation", choices=tuple(LAYERS))
    _data_options(matching)
    matching.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the checkpoint and the log")
    matching.add_argument("--resume", action="store_true", help="go on with the run in DIR, or start it")
    matching.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS", help="(default: %(default)s)")

    evaluate = commands.add_parser("evaluate", help="accuracy of a checkpoint on test classes, with its 95%% interval")
    evaluate.add_argument("checkpoint", type=Path, help="checkpoint.pt, or the folder of the run")
    evaluate.add_argument("--way", type=int, default=5, help="classes of an episode (default: %(default)s)")
    evaluate.add_argument("--shot", type=int, default=1, help="supports of each class (default: %(default)s)")
    evaluate.add_argument("--queries", type=int, default=15, help="queries of each class (default: %(default)s)")
    evaluate.add_argument("--episodes", type=int, default=1000, help="(default: %(default)s)")
    evaluate.add_argument("--seed", type=_seed, default=0, help="decides the episodes (default: %(default)s)")
    evaluate.add_argument("--data", choices=data.SETS, help="(default: what it was trained on)")
    evaluate.add_argument("--test-rotations", action="store_true", help="the test classes turned by 90, 180, 270 degrees are classes too")
    evaluate.add_argument("--layers", choices=tuple(LAYERS), help="(default: what it was trained with)")
    evaluate.add_argument("--baseline", action="store_true", help="also the nearest neighbour in pixels, on the same episodes")
    _data_options(evaluate)
    evaluate.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="versions, backends, and why what is missing is missing")
    info.set_defaults(run=_info)

    report = commands.add_parser("bench-report", help="a table, and a plot, of what `pytest bench/ --benchmark-json` measured")
    report.add_argument("json", nargs="+", type=Path)
    report.add_argument("--plot", type=Path, metavar="PNG")
    report.set_defaults(run=_bench_report)
    return parser


def _seed(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return int(text)


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", type=Path, metavar="DIR",
                        help="where Omniglot lies (default: FASTMETA_DATA, ../shared/omniglot, the cache)")
    parser.add_argument("--download", action="store_true", help="get Omniglot (14 MB) if it is not there")


def _load_data(name: str, options: argparse.Namespace, validation_classes: int = 0):
    from . import data
    root = options.data_root
    if options.download and name == "omniglot":
        root = data.omniglot.download(root)
    return data.load(name, root, validation_classes)


def _train(options: argparse.Namespace) -> int:
    from .training import MatchingConfig, load_checkpoint, train
    given = {field.name: getattr(options, field.name) for field in fields(MatchingConfig) if hasattr(options, field.name)}
    settings = {"rotations": given.get("data", MatchingConfig.data) == "omniglot"}
    if options.resume and (options.out / "checkpoint.pt").exists():
        settings = load_checkpoint(options.out)["config"]
    config = MatchingConfig(**{**settings, **given})
    data = _load_data(config.data, options, config.validation_classes)
    stopped = train(config, data, options.out, resume=options.resume, checkpoint_every=options.checkpoint_every)
    if os.environ.get("RANK", "0") == "0":
        root = f" --data-root {options.data_root}" if options.data_root else ""
        print(f"go on with: fastmeta train matching --out {options.out}{root} --resume" if stopped
              else f"now: fastmeta evaluate {options.out}{root}")
    return 128 + stopped if stopped else 0


def _evaluate(options: argparse.Namespace) -> int:
    from .training import evaluate, evaluate_pixels, load_model
    model, config = load_model(options.checkpoint, options.layers)
    test = _load_data(options.data or config.data, options).test
    if options.test_rotations:
        test = test.rotated()
    task = dict(way=options.way, shot=options.shot, queries=options.queries, episodes=options.episodes, seed=options.seed)
    print(f"{options.way}-way {options.shot}-shot, {options.queries} queries a class, {len(test.names)} unseen classes, "
          f"seed {options.seed}")
    print(f"matching network   {evaluate(model, test, **task)}", flush=True)
    if options.baseline:
        print(f"nearest in pixels  {evaluate_pixels(test, **task)}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .training.demo import demo
    return demo(options.out)


def _info(options: argparse.Namespace) -> int:
    from ._backend import info
    print(info())
    return 0


def _bench_report(options: argparse.Namespace) -> int:
    from .benchreport import report
    print(report(options.json, options.plot))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (None: that of the process); returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"fastmeta: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
