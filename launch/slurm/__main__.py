import sys

from megatron_lowbit.launch.slurm.render import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
