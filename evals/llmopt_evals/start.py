"""What the `llmopt` script calls: outside the package `llmopt`, so that Ctrl-C is understood even while torch loads."""
import signal
import sys


def main() -> None:
    """Run the command; an interruption at any moment ends in exit code 130 without a traceback."""
    try:
        from llmopt.cli.commands import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)      # all is done; Python, clearing away, would complain
