"""The command `minimistral`: one subcommand per thing one does with the course and its models."""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import chain

from minimistral import __version__

WORTH_COMPILING = 5_000                # new tokens; below that, compiling takes longer than it saves


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 checks failed, 2 wrong input, 130 stopped."""
    arguments = build_parser().parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `head`, or a pager that was left, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"minimistral: {in_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nminimistral: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130


def in_one_line(error: Exception) -> str:
    """What went wrong; an error of the system as its file and its reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option where there is one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or action.default is False or action.default == ""
        return action.help if unsaid else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimistral",
        description="The Mistral family of language models, built piece by piece.",
    )
    parser.add_argument("--version", action="version", version=f"minimistral {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_lab, _add_doctor, _add_check, _add_grade, _add_progress, _add_search, _add_glossary, _add_mistakes,
                _add_reset, _add_slides, _add_copies, _add_train, _add_generate, _add_chat, _add_serve,
                _add_postcard):
        add(commands)
    return parser


def _add_lab(commands) -> None:
    parser = commands.add_parser("lab", help="open the course in JupyterLab, in your own work/")
    parser.add_argument("--no-browser", action="store_true", help="print the address instead")
    parser.add_argument("--copy", action="store_true", help="only copy the notebooks, for another program")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --, for JupyterLab itself")
    parser.set_defaults(run=_lab)


def _lab(arguments: argparse.Namespace) -> int:
    from minimistral import lab

    return lab.main(browser=not arguments.no_browser, options=arguments.options, only_copy=arguments.copy)


def _add_doctor(commands) -> None:
    parser = commands.add_parser("doctor", help="is everything here? one line each, with the repair")
    parser.add_argument("--offline", action="store_true",
                        help="also try out a day without a network: models, notebooks, JupyterLab's page")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from minimistral import doctor

    return doctor.main(offline=arguments.offline)


def _add_check(commands) -> None:
    parser = commands.add_parser("check", help="run your notebooks in work/ and say what passes",
                                 formatter_class=_Help)
    parser.add_argument("chapter", nargs="?", type=int, help="its number (default: all chapters)")
    parser.add_argument("--seconds", type=float, default=180, metavar="S", help="limit for a notebook")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from minimistral.course import check_notebooks

    return check_notebooks.main(arguments.chapter, seconds=arguments.seconds)


def _add_grade(commands) -> None:
    parser = commands.add_parser(
        "grade", help="run a folder of submitted notebooks and say what passes", formatter_class=_Help,
        epilog="FOLDER holds one notebook or one folder for each student. Each notebook runs on a copy, in "
               "processes with limits; docs/grading.md says what that guards against and what not.",
    )
    option = parser.add_argument
    option("folder", metavar="FOLDER", help="the submissions: notebooks, folders or zip files")
    option("--out", metavar="OUT", help="for tables and overview (default: FOLDER-graded, beside it)")
    option("--chapter", type=int, metavar="NN", help="grade this chapter's exercises alone (default: all that are there)")
    option("--seconds", type=float, default=180, metavar="S", help="for one notebook")
    option("--memory", type=float, default=4, metavar="GB", help="for one notebook")
    option("--jobs", type=int, metavar="N", help="notebooks at a time (default: half the cores, at most 4)")
    parser.set_defaults(run=_grade)


def _grade(arguments: argparse.Namespace) -> int:
    try:
        from minimistral.course import grade
    except ImportError as error:
        raise ImportError(f'grading needs {error.name}: pip install "minimistral[course]"') from None
    return grade.main(arguments.folder, arguments.out, chapter=arguments.chapter, seconds=arguments.seconds,
                      memory=arguments.memory, jobs=arguments.jobs)


def _add_progress(commands) -> None:
    parser = commands.add_parser("progress", help="what passed, which mistakes you met, what comes next")
    parser.set_defaults(run=_progress)


def _progress(arguments: argparse.Namespace) -> None:
    from minimistral.course.progress_page import as_text

    print(as_text())


def _add_search(commands) -> None:
    parser = commands.add_parser("search", help="find sections of all chapters that have these words")
    parser.add_argument("words", nargs="+", metavar="WORD", help="all of them, in any order")
    parser.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> None:
    from minimistral.course import search

    print(search(" ".join(arguments.words)))


def _add_glossary(commands) -> None:
    parser = commands.add_parser("glossary", help="what a word of the course means")
    parser.add_argument("word", nargs="*", metavar="WORD", help="(default: list all words)")
    parser.set_defaults(run=_glossary)


def _glossary(arguments: argparse.Namespace) -> None:
    from minimistral.course import glossary

    print(glossary(" ".join(arguments.word)))


def _add_mistakes(commands) -> None:
    parser = commands.add_parser("mistakes", help="known mistakes: of a chapter, an exercise, or with a word")
    parser.add_argument("asked", nargs="+", metavar="NN|NAME|WORD", help="8, attend, or a symptom such as NaN")
    parser.set_defaults(run=_mistakes)


def _mistakes(arguments: argparse.Namespace) -> None:
    from minimistral.course import mistakes

    print(mistakes(" ".join(arguments.asked)))


def _add_slides(commands) -> None:
    parser = commands.add_parser(
        "slides", help="a chapter's slides as one HTML file",
        epilog="No network is needed to show them. Arrow keys go, N shows notes, F fills the screen.")
    parser.add_argument("chapter", type=int, metavar="NN")
    parser.add_argument("out", metavar="OUT", help="a folder, or a file that ends in .html")
    parser.add_argument("--further", action="store_true", help="with the optional sections")
    parser.set_defaults(run=_slides)


def _slides(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from minimistral.course.slides import write_slides

    path, count = write_slides(arguments.chapter, Path(arguments.out), further=arguments.further)
    print(f"{count} slides: {path}")


def _add_copies(commands) -> None:
    parser = commands.add_parser("copies", help="the course twice, for students and for the instructor")
    parser.add_argument("out", metavar="OUT", help="the folder that gets student/ and instructor/")
    parser.add_argument("--chapters", type=int, nargs="+", default=(), metavar="NN",
                        help="only these and chapter 0 (default: all)")
    parser.set_defaults(run=_copies)


def _copies(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from minimistral.course.copies import make_copies

    for folder in make_copies(Path(arguments.out), arguments.chapters):
        print(folder)


def _add_reset(commands) -> None:
    parser = commands.add_parser("reset", help="begin a chapter anew; your files are kept beside")
    parser.add_argument("chapter", type=int, help="its number, e.g. 04")
    parser.set_defaults(run=_reset)


def _reset(arguments: argparse.Namespace) -> None:
    from minimistral.lab import course_folder, course_work_folder, from_here, reset_chapter

    work = course_work_folder()
    for name, kept in reset_chapter(course_folder(), work, arguments.chapter):
        print(f"{name.as_posix()}: fresh" + (f"; yours is {kept.name}" if kept else ""))
    print(f"What passed, and your pieces in {from_here(work / 'mine')}, stay as they are.")


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train", help="train a model on a corpus or on your own text",
        formatter_class=_Help,
        epilog="The folder gets params.json, consolidated.safetensors, tekken.json and record.json.",
    )
    option = parser.add_argument
    option("--corpus", default="python", help="python, tales, shakespeare, or a text file in UTF-8")
    option("--out", required=True, metavar="FOLDER", help="a new folder for the model")
    option("--recipe", metavar="NAME", help="as a shipped model was made: tales-dense, tales-moe")
    option("--download", action="store_true", help="fetch tiny Shakespeare if it is not here")
    option("--resume", action="store_true", help="go on with the run in FOLDER, as it was begun")
    size = parser.add_argument_group("the model")
    size.add_argument("--dim", type=int, default=128, metavar="N", help="width")
    size.add_argument("--layers", type=int, default=4, metavar="N", help="blocks")
    size.add_argument("--heads", type=int, default=4, metavar="N", help="query heads")
    size.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads (default: as many)")
    size.add_argument("--hidden", type=int, metavar="N", help="feed-forward width (default: 8/3 of dim)")
    size.add_argument("--experts", type=int, metavar="N", help="experts, of which 2 work on a token (default: dense)")
    size.add_argument("--window", type=int, metavar="N", help="sliding window (default: none)")
    size.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="tokens to learn")
    length = parser.add_argument_group("the run")
    time = length.add_mutually_exclusive_group()
    time.add_argument("--steps", type=int, metavar="N", help="updates of the weights")
    time.add_argument("--minutes", type=float, metavar="M", help="as many as fit (default: 10)")
    length.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows in a step")
    length.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens in a row")
    length.add_argument("--lr", type=float, default=3e-3, metavar="X", help="highest learning rate")
    length.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data order")
    length.add_argument("--device", help="cpu, cuda, mps (default: the best one here)")
    length.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    parser.set_defaults(run=_train, defaults=vars(parser.parse_args(["--out", ""])))


def _train(arguments: argparse.Namespace) -> None:
    from minimistral import train_command

    train_command.run(arguments)


def _add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate", help="let a model continue a text", formatter_class=_Help
    )
    option = parser.add_argument
    option("--model", default="tales-dense", help="a shipped model's name, or a folder")
    option("--prompt", default="", help="the text to continue (default: none)")
    option("--max-new-tokens", type=int, default=200, metavar="N", help="length")
    option("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest token")
    option("--top-k", type=int, metavar="K", help="draw from the K likeliest only")
    option("--top-p", type=float, metavar="P", help="draw from the likeliest that add up to P")
    option("--seed", type=int, metavar="N", help="the same seed writes the same text again")
    option("--stream", action="store_true", help="show each token as it comes")
    option("--device", help="cpu, cuda, mps (default: the best one here)")
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    import minimistral as mm
    from minimistral.devices import pick_device
    from minimistral.engine import Engine

    model = mm.load_model(arguments.model, device=pick_device(arguments.device))
    tokenizer = mm.load_tokenizer(arguments.model)
    prompt, new = tokenizer.encode(arguments.prompt, bos=True), arguments.max_new_tokens
    # Compiling takes as long as some thousand tokens of a small model.
    engine = Engine(model, max_length=len(prompt) + max(new, 1),
                    compile="auto" if new >= WORTH_COMPILING else False)
    ids = engine.stream(
        prompt,
        new,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_ids=[tokenizer.eos_id],
    )
    if arguments.stream:
        for text in tokenizer.decode_stream(chain(prompt, ids)):
            print(text, end="", flush=True)
        print()
    else:
        print(tokenizer.decode([*prompt, *ids]))


def _add_chat(commands) -> None:
    parser = commands.add_parser(
        "chat", help="talk with a model in the terminal", formatter_class=_Help,
        epilog="In the chat: /reset begins anew, /system TEXT sets the instructions, /temperature X the "
               "chance, /history shows what was said, /quit ends it; Ctrl-C stops an answer. A line that ends "
               "with \\ goes on in the next.",
    )
    option = parser.add_argument
    option("--model", default="tales-chat", help="a shipped model's name, or a folder")
    option("--system", default="", metavar="TEXT", help="instructions for the whole talk (default: none)")
    option("--max-new-tokens", type=int, default=500, metavar="N", help="length of an answer")
    option("--max-length", type=int, default=4096, metavar="N", help="tokens read and written in all")
    option("--temperature", type=float, default=0.7, metavar="X", help="0: the likeliest token")
    option("--top-p", type=float, metavar="P", help="draw from the likeliest that add up to P")
    option("--seed", type=int, metavar="N", help="the same seed answers the same again")
    option("--device", help="cpu, cuda, mps (default: the best one here)")
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> None:
    from minimistral import chat_command

    chat_command.run(arguments)


def _add_serve(commands) -> None:
    parser = commands.add_parser(
        "serve", help="a local server with the public shapes of Mistral's and OpenAI's interfaces",
        formatter_class=_Help,
        epilog="MINIMISTRAL_API_KEY names the key that clients must send; without one the server "
               "listens on this machine alone.",
    )
    option = parser.add_argument
    option("--model", default="tales-chat", help="a shipped model's name, or a folder")
    option("--name", help="what clients ask for as model (default: that of --model)")
    option("--host", default="127.0.0.1", help="the address to listen at")
    option("--port", type=int, default=8000, metavar="N", help="its port")
    option("--batch-size", type=int, default=8, metavar="N", help="texts written at once")
    option("--max-length", type=int, default=4096, metavar="N", help="tokens of prompt and answer")
    option("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)")
    option("--no-compile", action="store_true", help="start at once, and write slower")
    option("--threads", type=int, metavar="N", help="cores for the model (default: all but one)")
    option("--device", help="cpu, cuda, mps (default: the best one here)")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import minimistral as mm
    from minimistral.devices import pick_device

    try:
        from minimistral import serve
    except ImportError as error:
        raise ImportError(f'the server needs {error.name}: pip install "minimistral[serve]"') from None
    model = mm.load_model(arguments.model, device=pick_device(arguments.device))
    name = arguments.name or Path(arguments.model).name
    serve.run(model, mm.load_tokenizer(arguments.model), name=name, host=arguments.host, port=arguments.port,
              batch_size=arguments.batch_size, max_length=arguments.max_length, dtype=arguments.dtype,
              threads=arguments.threads,
              compile=False if arguments.no_compile else "auto")


def _add_postcard(commands) -> None:
    parser = commands.add_parser(
        "postcard", help="one HTML page about a model you trained, to pass on", formatter_class=_Help
    )
    option = parser.add_argument
    option("folder", metavar="FOLDER", help="the folder that minimistral train has filled")
    option("--out", required=True, metavar="FILE", help="the page to write, such as card.html")
    option("--title", metavar="TEXT", help="the model's name (default: the folder's)")
    option("--prompt", default="", metavar="TEXT", help="let the sample continue this (default: none)")
    option("--seed", type=int, default=0, metavar="N", help="of the samples")
    option("--replace", action="store_true", help="write over a file that is there")
    parser.set_defaults(run=_postcard)


def _postcard(arguments: argparse.Namespace) -> None:
    from minimistral import postcard

    postcard.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
