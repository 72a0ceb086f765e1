"""The command `minimistral`: one subcommand per thing one does with the course and its models."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 checks failed, 2 wrong input, 130 stopped."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"minimistral: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminimistral: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimistral",
        description="The Mistral family of language models, built piece by piece.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_lab, _add_doctor, _add_generate):
        add(commands)
    return parser


def _add_lab(commands) -> None:
    parser = commands.add_parser("lab", help="open the course in JupyterLab, in your own work/")
    parser.add_argument("--no-browser", action="store_true", help="print the address instead")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --, for JupyterLab itself")
    parser.set_defaults(run=_lab)


def _lab(arguments: argparse.Namespace) -> int:
    from minimistral import lab

    return lab.main(browser=not arguments.no_browser, options=arguments.options)


def _add_doctor(commands) -> None:
    parser = commands.add_parser("doctor", help="is everything here? one line each, with the repair")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from minimistral import doctor

    return doctor.main()


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="let a model continue a text")
    parser.add_argument("--model", default="tales-dense", help="a shipped model's name, or a folder")
    parser.add_argument("--prompt", default="", help="the text to continue (default: none)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stream", action="store_true", help="show each token as it comes")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best one here)")
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    import minimistral as mm
    from minimistral.lab import decoded_stream

    model = mm.load_model(arguments.model, device=arguments.device)
    tokenizer = mm.load_tokenizer(arguments.model)
    ids = mm.stream(
        model,
        tokenizer.encode(arguments.prompt, bos=True),
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_ids=[tokenizer.eos_id],
    )
    print(arguments.prompt, end="", flush=True)
    if arguments.stream:
        for text in decoded_stream(tokenizer, ids):
            print(text, end="", flush=True)
        print()
    else:
        print(tokenizer.decode(list(ids)))


if __name__ == "__main__":
    sys.exit(main())
