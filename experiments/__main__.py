"""List the experiments: `python -m experiments`; as the table of the docs with --markdown."""

import sys

from experiments import catalog


def main() -> None:
    """Print question, command, time, published and measured figures of every experiment."""
    if sys.argv[1:] == ["--markdown"]:
        print(catalog.markdown())
        return
    print("Each is a command with flags of its own; --help lists them, --quick takes less than a minute.\n")
    for entry in catalog.EXPERIMENTS:
        print(entry.question)
        print(f"  {entry.command}" + (f"  ({entry.time} min on two cores)" if entry.time else ""))
        if entry.published:
            print(f"  published: {entry.published}")
        print(f"  measured:  {entry.answer}\n")


if __name__ == "__main__":
    main()
