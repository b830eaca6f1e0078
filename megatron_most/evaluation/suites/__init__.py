"""Evaluation suites: each reads a data set as it was published and judges a model on every sample of it."""

SUITES = {
    "asr": "word error rate of transcripts",
    "tts": "word error rate of what a recognizer hears in the model's speech",
    "swuggy": "share of words found more likely than non-words (ZeroSpeech 2021)",
    "sblimp": "share of grammatical sentences found more likely than others (ZeroSpeech 2021)",
    "storycloze": "share of stories with their own ending found more likely (sSC, tSC)",
    "salmon": "share of unchanged recordings found more likely (SALMon)",
    "sqa": "share of spoken questions answered (Llama Questions, TriviaQA, Web Questions)",
    "voicebench": "answers to spoken requests, for VoiceBench's own evaluators",
    "text": "perplexity and bits per byte of a text file",
}
"""Name -> what it measures."""
