-- Take servers whose records are gone out of the set; one that came back meanwhile stays.
-- KEYS[1] servers (set)   KEYS[2...] records   ARGV[1...] the records' ids, in the same order
-- Returns how many were taken out.
local gone = 0
for i, id in ipairs(ARGV) do
  if redis.call('EXISTS', KEYS[i + 1]) == 0 then
    gone = gone + redis.call('SREM', KEYS[1], id)
  end
end
return gone
