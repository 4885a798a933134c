-- Markdown's HTML on paper: <div class="x"> becomes the function x of paper.typ, what is folded a small heading.
function RawBlock(block)
  if block.format ~= "html" then return end
  local found = block.text:match('<div class="(%w+)">')
  local summary = block.text:match("<summary>(.-)</summary>")
  if found then return pandoc.RawBlock("typst", "#" .. found .. "[") end
  if block.text:match("</div>") then return pandoc.RawBlock("typst", "]") end
  if summary then return pandoc.RawBlock("typst", "#folded[" .. summary .. "]") end
end

-- A picture alone in its paragraph is as wide as the text.
function Para(paragraph)
  local image = paragraph.content[1]
  if #paragraph.content == 1 and image.t == "Image" then
    local alt = pandoc.utils.stringify(image.caption):gsub('"', "'")
    return pandoc.RawBlock("typst", string.format('#picture("%s", "%s")', image.src, alt))
  end
end
