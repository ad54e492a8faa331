"""What SonoVQA's scripts share: one flat package of small modules. The scripts import it; it never imports them.

Of several modules on one subject the names begin alike; begin with the one that is the bare word, where there is one:

    edges          cli files credentials records tracking* devices torchvision_ops doctor*
    questions      questions chat prompt_variants
    rows           sheets csv_text sources images duplicates splits rows dataset export
    public sets    public_sets hub_copies vqa_rad path_vqa medpix pubmedvision documents* phantom*
    answers        answers answer_* coherence structured extraction*
    one sequence   planning weighting sampling augmentation* layout batching losses
    models         families families_table weights memory* models adapters adapting text_only tiny architectures* choice
    training       training training_flags resuming adapter_shares merging finishing provenance hub model_card
    engines        engines generation choosing endpoint* confidence conversation likeness
    evaluation     evaluation_flags answering asking predictions elsewhere unscored most_useful folder_sheet
    scores         metrics measures overlap bertscore ranking calibration consistency scoring scoretable findings weak_slices
                   comparing robustness* report_html report_sections plots
    serving        serving* served_check vllm_server page* marks_book
    figures        bench* experiments* tables readme

A word with ``*`` stands for all modules that begin with it.
"""

__version__ = "0.1.0"
