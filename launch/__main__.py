import sys

from megatron_lowbit.launch import main

sys.exit(main())
