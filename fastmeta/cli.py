"""The command line: ``fastmeta demo | train | evaluate | info | bench-report``. What the user can put right is one line and status 2."""

import argparse
import os
import sys
from dataclasses import fields, replace
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    from . import __version__, data
    from .data.sequences import LABELS
    from .reference.cosine_attention import NORMALIZE
    from .reference.mann import PRESETS
    from .training.mann import NETWORKS
    from .training.matching import ENCODERS, PRECISIONS
    from .training.models import MODELS
    from .training.run import LAYERS

    parser = argparse.ArgumentParser(prog="fastmeta", description="Fused kernels for meta-learning layers: demo, training, evaluation.")
    parser.add_argument("--version", action="version", version=f"fastmeta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train on characters drawn here, test on unseen ones, time the layers, draw a picture")
    demo.add_argument("model", nargs="?", choices=tuple(MODELS), default="matching", help="(default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("fastmeta-demo.png"), metavar="PNG", help="the picture (default: %(default)s)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a model")
    kinds = train.add_subparsers(dest="model", required=True, metavar="MODEL")
    matching = _settings(kinds, "matching", "a Matching Network (Vinyals et al., 2016)")
    matching("way", "classes of a training episode", type=int)
    matching("shot", "supports of each class", type=int)
    matching("queries", "queries of each class", type=int)
    matching("encoder", "the embedding", choices=tuple(ENCODERS))
    matching("channels", "of the embedding", type=int)
    matching("fce", "full context embeddings")
    matching("fce_steps", "attention steps of the full context embedding", type=int, shown="as many as supports")
    matching("scale", "factor on the cosine; the paper has 1", type=float)
    matching("learn_scale", "learn the factor from that start")
    matching("normalize", "what the similarity divides by its norm", choices=NORMALIZE)
    matching("precision", "of the embedding while it trains", choices=PRECISIONS)

    mann = _settings(kinds, "mann", "a memory-augmented network, MANN, or the LSTM that it is compared with (Santoro et al., 2016)")
    mann("network", "MANN, or the LSTM alone", choices=NETWORKS)
    mann("classes", "of an episode", type=int)
    mann("presentations", "images of each class in an episode", type=int)
    mann("labels", "one symbol for each class, or strings of five letters", choices=LABELS)
    mann("clip", "largest norm of the gradient, 0 for any", type=float)
    mann("preset", "whose form of the equations", choices=tuple(PRESETS))
    mann("strength", "factor on the cosine: a number, or learned", type=_strength, shown="1")
    mann("hidden_size", "of the LSTM", type=int)
    mann("memory_slots", "rows of the memory", type=int)
    mann("memory_width", "numbers in a row", type=int)
    mann("read_heads", "of the memory", type=int)
    mann("usage_decay", "what is left of the usage after a step", type=float)
    mann("side", "of the images, in pixels", type=int)

    metanet = _settings(kinds, "metanet", "a Meta Network (Munkhdalai & Yu, 2017)")
    metanet("way", "classes of an episode, in training and after it", type=int)
    metanet("shot", "supports of each class", type=int)
    metanet("queries", "queries of each class", type=int)
    metanet("clip", "largest norm of the gradient, 0 for any", type=float)
    metanet("channels", "of the convolutions of both learners", type=int)
    metanet("blocks", "of convolution and pooling in both learners", type=int)
    metanet("hidden", "width of the layer after the blocks", type=int)
    metanet("generator_width", "of the two networks that make the fast weights", type=int)
    metanet("embedding_steps", "gradients that the embedding's fast weights are made of", type=int)
    metanet("second_order", "gradients flow through the gradients that fast weights are made of")

    evaluate = commands.add_parser("evaluate", help="accuracy of checkpoints on test classes, with its 95%% interval")
    evaluate.add_argument("checkpoint", type=Path, nargs="+", help="checkpoint.pt, or the folder of a run")
    task = dict(type=int, default=argparse.SUPPRESS)
    evaluate.add_argument("--way", **task, help="matching, metanet: classes of an episode (default: 5; metanet: as in training, no other)")
    evaluate.add_argument("--shot", **task, help="matching, metanet: supports of each class (default: 1; metanet: as in training)")
    evaluate.add_argument("--queries", **task, help="matching, metanet: queries of each class (default: 15)")
    evaluate.add_argument("--classes", **task, help="mann: classes of an episode (default: as in training)")
    evaluate.add_argument("--presentations", **task, help="mann: images of each class (default: as in training)")
    evaluate.add_argument("--plot", type=Path, metavar="PNG",
                          help="the learning curve, and what queries of an episode attend to; mann: accuracy by presentation, of all checkpoints")
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


def _settings(kinds, name: str, text: str):
    """The parser of ``train NAME`` with what every model has; returns ``setting(field, help)`` for the other fields of its configuration."""
    from . import data
    from .training.models import MODELS
    from .training.run import LAYERS

    parser = kinds.add_parser(name, help=text)
    parser.set_defaults(run=_train)
    defaults = {field.name: field.default for field in fields(MODELS[name].config)}

    def setting(field: str, text: str, **how) -> None:
        # Only what was given is in the result: --resume takes the rest from the checkpoint.
        if isinstance(defaults[field], bool):
            how["action"] = argparse.BooleanOptionalAction
        shown = how.pop("shown", defaults[field])
        parser.add_argument(f"--{field.replace('_', '-')}", default=argparse.SUPPRESS, help=f"{text} (default: {shown})", **how)

    setting("data", "the data set", choices=data.SETS)
    setting("episodes_per_batch", "episodes of one update", type=int)
    setting("steps", "updates; the learning rate falls to 0 along half a cosine", type=int)
    setting("lr", "learning rate of Adam at the start", type=float)
    setting("seed", "decides the weights and the episodes", type=_seed)
    setting("rotations", "train also on the classes turned by 90, 180, 270 degrees", shown="for omniglot")
    setting("distortion", "strength of the small random distortions of the training images", type=float)
    setting("validation_classes", "training classes to hold out", type=int)
    setting("eval_every", "updates between evaluations on the held-out classes, 0 for none", type=int)
    setting("layers", "the implementation", choices=tuple(LAYERS))
    _data_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the checkpoint and the log")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR, or start it")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS", help="(default: %(default)s)")
    return setting


def _strength(text: str) -> float | str:
    return text if text == "learned" else float(text)


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
    from .training import load_checkpoint, train
    from .training.models import MODELS
    kind = MODELS[options.model].config
    given = {field.name: getattr(options, field.name) for field in fields(kind) if hasattr(options, field.name)}
    settings = {"rotations": given.get("data", kind.data) == "omniglot"}
    if options.resume and (options.out / "checkpoint.pt").exists():
        theirs = load_checkpoint(options.out)["config"]
        settings = {field.name: theirs[field.name] for field in fields(kind) if field.name in theirs}
    config = kind(**{**settings, **given})
    data = _load_data(config.data, options, config.validation_classes)
    stopped = train(config, data, options.out, resume=options.resume, checkpoint_every=options.checkpoint_every)
    if os.environ.get("RANK", "0") == "0":
        root = f" --data-root {options.data_root}" if options.data_root else ""
        print(f"go on with: fastmeta train {options.model} --out {options.out}{root} --resume" if stopped
              else f"now: fastmeta evaluate {options.out}{root}")
    return 128 + stopped if stopped else 0


# What `evaluate` can be told of its episodes.
_FEW_SHOT_TASK, _MANN_TASK = ("way", "shot", "queries"), ("classes", "presentations")


def _evaluate(options: argparse.Namespace) -> int:
    from .training import load_model
    from .training.models import run_of
    runs = [(path, *load_model(path, options.layers)) for path in options.checkpoint]
    names = [run_of(config).name for _, _, config in runs]
    if options.plot:
        from .training.curves import check_picture, draw_curves
        check_picture(options.plot)
        if len(runs) > 1 and set(names) != {"mann"}:
            raise ValueError(f"--plot draws one run, or several of mann; got {', '.join(names)}")
    curves = {}
    for name, (path, model, config) in zip(names, runs):
        strangers = [task for task in (_FEW_SHOT_TASK if name == "mann" else _MANN_TASK) if hasattr(options, task)]
        if strangers:
            raise ValueError(f"--{strangers[0]} has no meaning for {path}: it holds {name}")
        test = _load_data(options.data or config.data, options).test
        if options.test_rotations:
            test = test.rotated()
        if len(runs) > 1:
            print(path)
        if name == "mann":
            curves[path] = _evaluate_mann(model, config, test, options)
        else:
            _evaluate_few_shot(path, name, model, config, test, options)
    if options.plot:
        if curves:
            draw_curves(options.plot, curves)
        print(f"{options.plot} written")
    return 0


def _evaluate_few_shot(path: Path, name: str, model, config, test, options: argparse.Namespace) -> None:
    from .training import evaluate, evaluate_pixels
    way, shot = (config.way, config.shot) if name == "metanet" else (5, 1)
    task = {"way": way, "shot": shot, "queries": 15} | {field: getattr(options, field) for field in _FEW_SHOT_TASK if hasattr(options, field)}
    way, shot = task["way"], task["shot"]
    print(f"{way}-way {shot}-shot, {task['queries']} queries a class, {len(test.names)} unseen classes, seed {options.seed}", flush=True)
    task |= dict(episodes=options.episodes, seed=options.seed)
    accuracy = evaluate(model, test, **task, progress=True)
    print(f"{'meta' if name == 'metanet' else name} network".ljust(19) + str(accuracy), flush=True)
    if options.baseline:
        print(f"nearest in pixels  {evaluate_pixels(test, **task)}")
    if options.plot:
        from .training.curves import draw_few_shot
        # of many supports the picture could show little
        draw_few_shot(options.plot, path, test, [f"{way}-way {shot}-shot, unseen: {100 * accuracy.mean:.1f} ± {100 * accuracy.interval:.1f}%"],
                      way=way, shot=max(1, min(shot, 20 // way)), seed=options.seed)


def _evaluate_mann(model, config, test, options: argparse.Namespace):
    from .training import evaluate_presentations, evaluate_presentations_pixels
    if config.labels == "one-hot" and getattr(options, "classes", config.classes) != config.classes:
        raise ValueError(f"--classes must be {config.classes}, as in training: one-hot labels have a place for each class")
    config = replace(config, **{name: getattr(options, name) for name in ("classes", "presentations") if hasattr(options, name)})
    print(f"{config.classes} classes, {config.presentations} presentations of each, {config.labels} labels, {len(test.names)} unseen classes, "
          f"seed {options.seed}, {options.episodes} episodes")
    columns = {config.network: evaluate_presentations(model, test, config, episodes=options.episodes, seed=options.seed)}
    if options.baseline:
        columns["pixels"] = evaluate_presentations_pixels(test, config, episodes=options.episodes, seed=options.seed)
    print("presentation  " + "".join(f"{name:<18}" for name in columns))
    for k, row in enumerate(zip(*columns.values()), 1):
        print(f"{k:>12}  " + "".join(f"{f'{100 * each.mean:.2f}% ± {100 * each.interval:.2f}%':<18}" for each in row))
    return config, columns


def _demo(options: argparse.Namespace) -> int:
    from .training.demo import demo
    return demo(options.model, options.out)


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
