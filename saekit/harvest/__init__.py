"""Model + text -> activations: a live stream, or a store on disk."""

from saekit.harvest.beside import SideBySide as SideBySide
from saekit.harvest.sequences import ContinuedBatch as ContinuedBatch
from saekit.harvest.sequences import ContinuedSource as ContinuedSource
from saekit.harvest.sequences import SequenceSource as SequenceSource
from saekit.harvest.sequences import StoredSequences as StoredSequences
from saekit.harvest.store import bytes_per_token as bytes_per_token
from saekit.harvest.store import check_writable as check_writable
from saekit.harvest.store import harvest as harvest
from saekit.harvest.stream import HarvestConfig as HarvestConfig
from saekit.harvest.stream import Stream as Stream
from saekit.harvest.stream import StreamSource as StreamSource
