"""Reasons that jobs end with: the closed set that metrics are labelled by. docs/errors.md says what to do about each.

A pod may end with any word as its reason, and conditions show it; of a word that is not known here, a metric says `Other`.
"""

from __future__ import annotations

from typing import get_args

from .contract import PEER_LOST, WAITING_FOR_SOURCE, Stage
from .signatures import SIGNATURES

OTHER = "Other"

_OF_THE_OPERATOR = """
    Completed Cancelled DeadlineExceeded Disrupted GangTimeout GateInconclusive GateNotPassed InvalidSpec NoNodeFits NoResult OutOfMemory OutOfSync
    PlanMismatch PodDeleted PodFailed Preempted RemoteCodeNotAllowed Resized Restored SourceUnavailable SpecChanged StageTimeout Suspended
    TooManyRestarts
"""
_OF_THE_TRAINER = """
    AdapterNotReadable AddressNotAllowed AttentionNotSupported BadJSONSchema BadRegex BadSystemPrompt ChatTemplateFailed
    ChatTemplateTooLarge ChatTemplateTooSlow ConversionFailed DatasetNotAFile DatasetNotAList DatasetNotCSV DatasetNotFound
    DatasetNotGzip DatasetNotJSON DatasetNotParquet DatasetNotUTF8 DatasetTooLarge DatasetType DecompressionBomb
    DeviceMismatch DoesNotFit DownloadFailed DownloadIncomplete DuplicateRows EmptyDataset EmptyResult EndpointRefused
    EndpointUnreachable FormDiffers Hang HostNotFound InvalidRows LFSPointer LeakedRows LongerThanPositions MainNotFound MergeDiffers
    MethodNotSupported MixedFormats ModelNotFound ModelNotReadable ModelNotWhole NearDuplicateRows NearLeakedRows NoAnswers NoChatTemplate
    NoEvalRows NoExamples NoFlashAttention NoGGUF NoONNX NoPrompts NoSafetensors NoSuchModule NoTurnEnd NonFiniteLoss
    NothingToPublish OneSided OtherVocabulary PathLeavesVolume ProcessDied PromptTooLong PublishFailed PublishRefused
    QuantizedBase RedirectRefused RemoteCode Replaced ReshardFailed RowsTooLong RunChanged SettingsRefused SharedDevice
    SlowTokenizer SourceNotFound SourceNotMounted Stopped StoppedEarly StrategyMismatch TargetNotMounted TargetNotWritable
    TargetContended TargetTaken TaskNotLoaded TokenizerNotReadable TokensBeyondVocabulary TooFewExamples
    TooManyRedirects UnexpectedError UnknownColumn UnknownFormat UnknownTask VerificationFailed WeightsMismatch
    WeightsMissing WeightsNotFinite WeightsNotReadable WorkerDied WorldMismatch WrongAdapter WrongArchitecture
    WrongFormat
"""
REASONS = frozenset(
    (
        *_OF_THE_OPERATOR.split(),
        *_OF_THE_TRAINER.split(),
        *(f"{stage.capitalize()}Failed" for stage in get_args(Stage)),
        *(signature.reason for signature in SIGNATURES),
        PEER_LOST,
        WAITING_FOR_SOURCE,
    )
)


def known_reason(reason: str) -> str:
    """The reason where it is one of the closed set, else `Other`."""
    return reason if reason in REASONS else OTHER
